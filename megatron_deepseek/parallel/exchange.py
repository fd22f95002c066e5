"""How every rank of a group comes to see every rank's block, and how the blocks' gradients come home.

    Ring    cp - 1 steps; while the caller works on one block the next one travels (arXiv 2310.01889). Gradients travel
            the same way, each rank adding its own, and arrive at the owner after cp steps.
    Gather  one all-gather before the work, one reduce-scatter after it.

Both hand the blocks out in the same order, this rank's first. Gradients are summed in at least float32.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_deepseek.parallel.tensor import all_gather, reduce_scatter

Blocks = Iterator[tuple[int, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Ring:
    """Point to point: each rank sends to the next and receives from the one before."""

    group: dist.ProcessGroup

    def blocks(self, own: torch.Tensor) -> Blocks:
        """(owner, its block) for every rank of the group."""
        size, block = self.group.size(), own.contiguous()
        for step in range(size):
            arriving = Transfer(block, self.group) if step < size - 1 else None
            yield (self.group.rank() - step) % size, block
            if arriving is not None:
                block = arriving.wait()

    def return_gradients(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """The sum over the ranks of the gradient of this rank's own block; `gradients` is in the order of `blocks`."""
        arriving, dtype = None, None
        for gradient in gradients:  # made while the sum for the same owner is still on its way
            dtype = gradient.dtype
            total = gradient.to(torch.promote_types(dtype, torch.float32))
            if arriving is not None:
                total = total + arriving.wait()
            arriving = Transfer(total.contiguous(), self.group)
        return arriving.wait().to(dtype)


class Transfer:
    """A block on its way to the next rank, and the one that comes from the rank before."""

    def __init__(self, block: torch.Tensor, group: dist.ProcessGroup):
        size, rank = group.size(), group.rank()
        self.sent, self.received = block, torch.empty_like(block)
        self.works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, self.sent, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, self.received, group=group, group_peer=(rank - 1) % size)])

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.received


@dataclass(frozen=True, eq=False)
class Gather:
    """Collectives: every block at once."""

    group: dist.ProcessGroup

    def blocks(self, own: torch.Tensor) -> Blocks:
        gathered = all_gather(own, 0, self.group).chunk(self.group.size())
        yield from ((owner, gathered[owner]) for owner in self._order())

    def return_gradients(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        by_owner = dict(zip(self._order(), gradients, strict=True))
        dtype = by_owner[0].dtype
        stacked = torch.cat([by_owner[owner] for owner in range(len(by_owner))])
        return reduce_scatter(stacked.to(torch.promote_types(dtype, torch.float32)), 0, self.group).to(dtype)

    def _order(self) -> list[int]:
        size = self.group.size()
        return [(self.group.rank() - step) % size for step in range(size)]


EXCHANGES = {"ring": Ring, "allgather": Gather}
