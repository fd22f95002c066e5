"""Clusters in csrc/gemm_kernel.cuh: every order in which two blocks that fill each other's stages can act, tried.

Each block has a producer, a consumer and a ring of stages. A producer has half of a stage copied into both blocks; the
copies come at times of their own. Arrivals at a block that has ended are an error, as are stages that are written while
they are read, or read before both halves are there.
"""

from dataclasses import dataclass, replace

import pytest
from barrier_model import Actor, Barrier, explore, put

BLOCKS = (0, 1)


@dataclass(frozen=True)
class Rules:
    """What the kernel does; a test changes one at a time."""

    arrivals: int = 2  # that an empty barrier is made for: consumers of both blocks
    tells: tuple[int, ...] = (0, 1)  # the blocks at whose barriers a consumer arrives, counted from its own
    copies_to: tuple[int, ...] = (0, 1)  # likewise, of a producer's copies
    announced: int = 2  # halves that a full barrier waits for
    ends_together: bool = True


@dataclass(frozen=True)
class Block:
    full: tuple[Barrier, ...]
    empty: tuple[Barrier, ...]
    holds: tuple[tuple[int, int], ...]  # of each stage, the steps whose halves it has
    producer: Actor = Actor()
    consumer: Actor = Actor()


@dataclass(frozen=True)
class Copy:
    source: int
    target: int
    step: int


@dataclass(frozen=True)
class State:
    blocks: tuple[Block, Block]
    flying: frozenset[Copy] = frozenset()

    def moved(self, index: int, **changes) -> "State":
        return replace(self, blocks=put(self.blocks, index, replace(self.blocks[index], **changes)))


class Cluster:
    def __init__(self, stages: int, steps: int, rules: Rules = Rules()):
        self.stages, self.steps, self.rules = stages, steps, rules
        block = Block((Barrier(1, 1),) * stages, (Barrier(rules.arrivals, rules.arrivals),) * stages,
                      ((-1, -1),) * stages)
        self.start = State((block, block))

    def explore(self) -> int:
        return explore(self.start, self.next, lambda state: all(map(self.is_done, state.blocks)))

    def is_done(self, block: Block) -> bool:
        return block.producer.step == block.consumer.step == self.steps

    def reach(self, state: State, index: int) -> Block:
        """Return a block whose shared memory another one writes or arrives at."""
        block = state.blocks[index]
        assert self.rules.ends_together or not self.is_done(block), "reached a block that has ended"
        return block

    def next(self, state: State):
        for index in BLOCKS:
            if state.blocks[index].producer.step < self.steps:
                yield from self._produce(state, index)
            if state.blocks[index].consumer.step < self.steps:
                yield from self._consume(state, index)
        for copy in state.flying:
            yield self._arrive(state, copy)

    def _produce(self, state: State, index: int):
        block = state.blocks[index]
        actor, stage = block.producer, block.producer.step % self.stages
        if actor.place == "wait" and block.empty[stage].over(actor.step // self.stages % 2 ^ 1):
            yield state.moved(index, producer=replace(actor, place="announce"))
        elif actor.place == "announce":
            full = put(block.full, stage, block.full[stage].arrive(self.rules.announced))
            yield state.moved(index, producer=replace(actor, place="copy"), full=full)
        elif actor.place == "copy":
            copies = {Copy(index, index ^ other, actor.step) for other in self.rules.copies_to}
            yield replace(state.moved(index, producer=Actor(actor.step + 1)), flying=state.flying | copies)

    def _arrive(self, state: State, copy: Copy) -> State:
        block, stage = self.reach(state, copy.target), copy.step % self.stages
        reader = block.consumer
        assert not (reader.place == "read" and reader.step % self.stages == stage), "written while it is read"
        state = state.moved(copy.target, full=put(block.full, stage, block.full[stage].arrived_copy()),
                            holds=put(block.holds, stage, put(block.holds[stage], copy.source, copy.step)))
        return replace(state, flying=state.flying - {copy})

    def _consume(self, state: State, index: int):
        block = state.blocks[index]
        actor, stage = block.consumer, block.consumer.step % self.stages
        if actor.place == "wait":
            if block.full[stage].over(actor.step // self.stages % 2):
                yield state.moved(index, consumer=replace(actor, place="read"))
        elif actor.place == "read":
            assert block.holds[stage] == (actor.step, actor.step), "read before it was written, or what came after"
            yield self._tell(state, index, 0)
        else:
            yield self._tell(state, index, int(actor.place))

    def _tell(self, state: State, index: int, told: int) -> State:
        """Return the state after the consumer's next arrival; those at the two blocks may lie apart."""
        actor = state.blocks[index].consumer
        target, stage = index ^ self.rules.tells[told], actor.step % self.stages
        block = self.reach(state, target)
        state = state.moved(target, empty=put(block.empty, stage, block.empty[stage].arrive()))
        last = told + 1 == len(self.rules.tells)
        return state.moved(index, consumer=Actor(actor.step + 1) if last else replace(actor, place=str(told + 1)))


@pytest.mark.parametrize("stages, steps", [(1, 3), (2, 3)])
def test_no_order_goes_wrong(stages, steps):
    assert Cluster(stages, steps).explore() > 50 * steps


@pytest.mark.parametrize("rules", [
    Rules(arrivals=1), Rules(arrivals=3), Rules(tells=(0,)), Rules(tells=(0,), arrivals=1), Rules(tells=(0, 0)),
    Rules(copies_to=(0,)), Rules(copies_to=(0,), announced=1), Rules(announced=1), Rules(ends_together=False)], ids=str)
def test_other_rules_do(rules):
    with pytest.raises(AssertionError):
        Cluster(2, 5, rules).explore()
