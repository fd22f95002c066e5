"""How every rank of a context group gets every rank's block, and how the blocks' gradients return to their owners.

    Ring    cp - 1 steps; while the caller works on one block the next one travels (arXiv 2310.01889). Gradients travel
            the same way, each rank adding its part. After cp - 1 steps they are at the owner, which adds its own.
    Gather  one all-gather before the work, one reduce-scatter after it.
    Alone   nothing travels: this rank has whole sequences.

Where the ranks of a tensor-parallel group have the same blocks, each need send only a slice of them (`Sliced`).

All yield the blocks in the same order, this rank's own first, and take their gradients in the same order but for this
rank's own, which come last (`own_last`). Gradients are summed in at least float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from megatron_deepseek.parallel.collectives import all_gather, reduce_scatter

Blocks = Iterator[tuple[int, torch.Tensor]]
TOKENS = 1  # the dimension of a block


def own_last(of_blocks: Sequence[Any]) -> list[Any]:
    """Return things of blocks in the order in which gradients are returned, given in the order of `blocks`."""
    own, *others = of_blocks
    return [*others, own]


@dataclass(frozen=True, eq=False)
class Ring:
    """Point-to-point transfers: each rank sends to the next one and receives from the one before."""

    group: dist.ProcessGroup

    def blocks(self, own: torch.Tensor) -> Blocks:
        """Yield (owner, its block) for every rank of the group, while the next block is on its way."""
        size, block = self.group.size(), own.contiguous()
        for step in range(size):
            arriving = Transfer(block, self.group) if step < size - 1 else None
            yield (self.group.rank() - step) % size, block
            if arriving is not None:
                block = arriving.wait()

    def return_gradients(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return the gradient of this rank's own block, summed over the ranks.

        `gradients` are those of all blocks, this rank's own last. Each is made only when it is needed, while the sum
        before it travels.
        """
        arriving, last = None, self.group.size() - 1
        for step, gradient in enumerate(gradients):  # made while the sum for the same owner is still on its way
            total = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            if arriving is not None:
                total = total + arriving.wait()
            if step < last:
                arriving = Transfer(total.contiguous(), self.group)
        return total.to(gradient.dtype)


class Transfer:
    """A block that travels to the next rank, and the one that comes from the rank before."""

    def __init__(self, block: torch.Tensor, group: dist.ProcessGroup):
        size, rank = group.size(), group.rank()
        self.sent, self.received = block, torch.empty_like(block)
        self.works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, self.sent, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, self.received, group=group, group_peer=(rank - 1) % size)])

    def wait(self) -> torch.Tensor:
        """Return the block that came, when both transfers are done."""
        for work in self.works:
            work.wait()
        return self.received


@dataclass(frozen=True, eq=False)
class Gather:
    """Collectives: all blocks at once."""

    group: dist.ProcessGroup

    def blocks(self, own: torch.Tensor) -> Blocks:
        """Yield (owner, its block) for every rank of the group, all of which are gathered first."""
        gathered = all_gather(own, 0, self.group).chunk(self.group.size())
        yield from ((owner, gathered[owner]) for owner in self._order())

    def return_gradients(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return the gradient of this rank's own block, summed over the ranks; `gradients` as in `Ring`."""
        by_owner = dict(zip(own_last(self._order()), gradients, strict=True))
        dtype = by_owner[0].dtype
        stacked = torch.cat([by_owner[owner] for owner in range(len(by_owner))])
        return reduce_scatter(stacked.to(torch.promote_types(dtype, torch.float32)), 0, self.group).to(dtype)

    def _order(self) -> list[int]:
        size = self.group.size()
        return [(self.group.rank() - step) % size for step in range(size)]


@dataclass(frozen=True, eq=False)
class Sliced:
    """An exchange of blocks [B, S, C] that all ranks of a tensor-parallel group have alike.

    Each rank sends its slice of the tokens by `exchange`, and slices are put together inside `group`, whose ranks are
    nearer: of what crosses between context ranks no number crosses twice. Gradients, which are each rank's part of a
    sum over `group`, are summed and sliced there first.
    """

    exchange: Ring | Gather
    group: dist.ProcessGroup

    def blocks(self, own: torch.Tensor) -> Blocks:
        """Yield (owner, its block) for every context rank."""
        slices = self.exchange.blocks(self._slice(own))
        yield next(slices)[0], own
        for owner, part in slices:
            yield owner, all_gather(part, TOKENS, self.group)

    def return_gradients(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return this rank's part of the gradient of its own block: the sum in its slice, and 0 elsewhere."""
        gradients = iter(gradients)
        first = next(gradients)
        wide = torch.promote_types(first.dtype, torch.float32)
        summed = self.exchange.return_gradients(
            reduce_scatter(gradient.to(wide), TOKENS, self.group) for gradient in chain([first], gradients))
        whole = torch.zeros_like(first)
        self._slice(whole).copy_(summed)
        return whole

    def _slice(self, block: torch.Tensor) -> torch.Tensor:
        return block.chunk(self.group.size(), TOKENS)[self.group.rank()]


class Alone:
    """The exchange of a rank that shares its sequences with no other."""

    def blocks(self, own: torch.Tensor) -> Blocks:
        """Yield this rank's own block."""
        yield 0, own

    def return_gradients(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return the gradient of this rank's own block, the only one of `gradients`."""
        (gradient,) = gradients
        return gradient


EXCHANGES = {"ring": Ring, "allgather": Gather}
