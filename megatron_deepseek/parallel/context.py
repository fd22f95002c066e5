"""Context parallelism: the ranks of a group share each sequence, and attention sees all of it.

A sequence is cut in 2*cp chunks; rank r holds chunks r and 2*cp-1-r (zigzag), so that every rank has the same number of
causal pairs to compute. What a rank sees of the others' chunks is in block_mask.py, how chunks travel in exchange.py,
and attention over them in blockwise_attention.py.

Labels, MTP shifts and masks are made on whole sequences before any is cut.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_deepseek.device import send
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.block_mask import BlockMask
from megatron_deepseek.parallel.exchange import EXCHANGES, Gather, Ring, Sliced


def zigzag(seq_length: int, rank: int, size: int) -> torch.Tensor:
    """Return the positions in the whole sequence of the tokens of `rank`, int64 [S], increasing.

    Raise ValueError for a length that is not divisible by 2 * `size`.
    """
    if size == 1:
        return torch.arange(seq_length, device="cpu")
    if seq_length % (2 * size):
        raise ValueError(f"sequences of {seq_length} tokens do not divide into 2 x {size} chunks, two for each "
                         f"context-parallel rank")
    chunks = torch.arange(seq_length, device="cpu").chunk(2 * size)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """The ranks that share a sequence. `exchange` is a name in EXCHANGES: how blocks travel among them."""

    mesh: DeviceMesh
    exchange: str = "ring"

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    def positions(self, seq_length: int) -> torch.Tensor:
        """Return where this rank's tokens stand in the whole sequence, int64 [S]."""
        return zigzag(seq_length, self.rank, self.size)

    def own(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Return this rank's part of something that has all positions of a sequence along `dim`."""
        return x if self.size == 1 else x.index_select(dim, send(self.positions(x.shape[dim]), x.device))

    def block_mask(self, seq_length: int, documents: Documents | None = None) -> BlockMask:
        """Return what this rank's tokens see of sequences of `seq_length`, within documents where they are given."""
        return BlockMask(self.rank, self.size, seq_length // self.size, documents)

    def make_exchange(self, length: int, alike: dist.ProcessGroup | None = None) -> Ring | Gather | Sliced:
        """Return the exchange of this group's blocks of `length` tokens.

        `alike`: a tensor-parallel group whose ranks all have the same blocks, None if each has its own. If it does not
        divide the tokens, each rank sends whole blocks.
        """
        exchange = EXCHANGES[self.exchange](self.group)
        if alike is None or alike.size() == 1 or length % alike.size():
            return exchange
        return Sliced(exchange, alike)
