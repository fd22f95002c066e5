"""The ring of stages in csrc/gemm_kernel.cuh: every order in which producer, copy engine and consumers can act, tried.

A model of its protocol, small enough to exhaust. A stage that is written while it is read, or read before it is
written, is an error, and so is a state in which nobody can go on and somebody is not done.
"""

from dataclasses import dataclass, replace

import pytest
from barrier_model import Actor, Barrier, explore, put


@dataclass(frozen=True)
class Rules:
    """What the kernel does; a test changes one at a time."""

    producer_parity: int = 1  # of its first wait for an empty stage
    arrivals: int = 2  # that an empty barrier is made for: the consumers (warps, in the kernel)
    releases_after_reading: bool = True
    flips_at: int = 0  # parities change when a ring's place comes back to this stage


@dataclass(frozen=True)
class State:
    producer: Actor
    consumers: tuple[Actor, ...]
    full: tuple[Barrier, ...]
    empty: tuple[Barrier, ...]
    holds: tuple[int, ...]  # block of K whose codes a stage has, -1 for none
    flying: frozenset[tuple[int, int]] = frozenset()  # copies asked for: (stage, block)


class Machine:
    def __init__(self, stages: int, blocks: int, rules: Rules = Rules(), consumers: int = 2):
        self.stages, self.blocks, self.rules = stages, blocks, rules
        self.start = State(Actor(), (Actor(),) * consumers, (Barrier(1, 1),) * stages,
                           (Barrier(rules.arrivals, rules.arrivals),) * stages, (-1,) * stages)

    def parity(self, step: int) -> int:
        return (step - self.rules.flips_at) // self.stages % 2

    def next(self, state: State):
        yield from self._produce(state)
        for stage, block in state.flying:
            for reader in state.consumers:
                assert not (reader.place == "read" and reader.step % self.stages == stage), "written while it is read"
            yield replace(state, flying=state.flying - {(stage, block)}, holds=put(state.holds, stage, block),
                          full=put(state.full, stage, state.full[stage].arrived_copy()))
        for index, actor in enumerate(state.consumers):
            yield from self._consume(state, index, actor)

    def _produce(self, state: State):
        actor, stage = state.producer, state.producer.step % self.stages
        if actor.step == self.blocks:
            return
        full, flying = state.full[stage], state.flying | {(stage, actor.step)}
        if actor.place == "wait" and state.empty[stage].over(self.parity(actor.step) ^ self.rules.producer_parity):
            yield replace(state, producer=replace(actor, place="announce"))
        elif actor.place == "announce":
            announced = put(state.full, stage, full.arrive(copies=1))
            yield replace(state, producer=replace(actor, place="copy"), full=announced)
        elif actor.place == "copy":
            yield replace(state, producer=Actor(actor.step + 1), flying=flying)

    def _consume(self, state: State, index: int, actor: Actor):
        stage = actor.step % self.stages
        if actor.step == self.blocks:
            return

        def moved(to: Actor, **more):
            return replace(state, consumers=put(state.consumers, index, to), **more)

        released = {"empty": put(state.empty, stage, state.empty[stage].arrive())} if actor.place == (
            "read" if self.rules.releases_after_reading else "full") else {}
        if actor.place == "wait" and state.full[stage].over(self.parity(actor.step)):
            yield moved(replace(actor, place="full"))
        elif actor.place == "full":
            assert state.holds[stage] == actor.step, "read before it was written, or what came after"
            yield moved(replace(actor, place="read"), **released)
        elif actor.place == "read":
            assert state.holds[stage] == actor.step, "overwritten while it is read"
            yield moved(Actor(actor.step + 1), **released)

    def explore(self) -> int:
        return explore(self.start, self.next, lambda state: all(
            actor.step == self.blocks for actor in (state.producer, *state.consumers)))


@pytest.mark.parametrize("stages, blocks", [(1, 3), (2, 5), (3, 7)])
def test_no_order_goes_wrong(stages, blocks):
    """More than two rounds through the ring, so that both parities come back."""
    assert Machine(stages, blocks).explore() > 10 * blocks


@pytest.mark.parametrize("rules", [
    Rules(producer_parity=0), Rules(arrivals=1), Rules(arrivals=3), Rules(releases_after_reading=False),
    Rules(flips_at=1), Rules(flips_at=2)], ids=str)
def test_other_rules_do(rules):
    with pytest.raises(AssertionError):
        Machine(3, 7, rules).explore()
