"""Weights of FP8 GEMMs, quantised once for each time that FSDP gathers them, together with their transpose.

A weight is the same for all micro-batches between two gatherings: for its forward, its dgrad and whatever is
recomputed. So it is quantised where it is gathered, held as E4M3 alone (as many bytes as in bfloat16: codes for the
forward, codes of the transpose for dgrad), and freed with it. There is no cache to invalidate: after the optimizer's
step weights are gathered again.

Optionally shards are quantised before they are gathered, which halves the bytes. The numbers are the same where every
block of 128x128 lies in one shard: always for stacked experts, as FSDP cuts between them; for other weights where each
rank has the same multiple of 128 rows. Weights that do not fit are gathered in the compute dtype, and quantised after.

`Fp8Shard` has the two methods by which FSDP2 lets a shard choose what is gathered of it (fsdp_pre_all_gather and
fsdp_post_all_gather, as torchao's float8 uses them).

Shapes: N output features, K inputs, E experts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megatron_deepseek.device import on_accelerator
from megatron_deepseek.ops.fp8 import encoding

Blocks = tuple[torch.Tensor, torch.Tensor]  # codes [..., N, K] and scales [..., ceil(N / 128), ceil(K / 128)]

_aten = torch.ops.aten
_UNCHANGED = (_aten.detach.default, _aten.alias.default, _aten.view.default, _aten.as_strided.default)


class Fp8Weight(torch.Tensor):
    """A gathered weight [..., N, K]: `blocks` are its codes and scales, `transposed` those of [..., K, N], or what
    makes them each time that they are asked for.
    """

    @staticmethod
    def __new__(cls, blocks: Blocks, transposed: Blocks | Callable[[], Blocks], dtype: torch.dtype):
        self = torch.Tensor._make_wrapper_subclass(cls, blocks[0].shape, dtype=dtype, device=blocks[0].device)
        self.blocks, self.transposed = blocks, transposed
        return self

    def __repr__(self) -> str:
        return f"Fp8Weight({self.dtype}, {self.blocks!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Return views of the whole, for autograd and DTensor; raise NotImplementedError where values are needed."""
        if function in _UNCHANGED and (len(args) == 1 or tuple(args[1]) == tuple(args[0].shape)):
            return Fp8Weight(args[0].blocks, args[0].transposed, args[0].dtype)
        if function is _aten.is_same_size.default:
            return args[0].shape == args[1].shape
        raise NotImplementedError(f"{function} of a weight that is held in FP8 alone")


def blocks_of(weight: torch.Tensor) -> Blocks:
    """Return the forward's codes and scales, quantised now if the weight was not gathered as FP8 (inference)."""
    return weight.blocks if isinstance(weight, Fp8Weight) else encoding.quantize_128x128(weight)


def transposed_of(weight: torch.Tensor) -> Blocks:
    """Return dgrad's codes and scales, quantised now if the weight was not gathered as FP8."""
    if not isinstance(weight, Fp8Weight):
        return encoding.quantize_both_ways(weight)[1]
    return weight.transposed() if callable(weight.transposed) else weight.transposed


@dataclass(frozen=True, eq=False)
class Fp8Shard:
    """This rank's shard of a weight, [n, K] or [e, N, K], padded to the size that every rank has, as FSDP gathers it.

    `in_fp8`: quantise it before the gathering, unless a block of 128x128 is cut.
    """

    shard: torch.Tensor
    in_fp8: bool

    def size(self) -> torch.Size:
        return self.shard.size()

    def to(self, *args, **kwargs) -> "Fp8Shard":
        return Fp8Shard(self.shard.to(*args, **kwargs), self.in_fp8)

    def whole_blocks(self, ranks: int, whole: torch.Size) -> bool:
        """Return whether every block of the weight, of shape `whole`, lies in one of the shards."""
        even = whole[0] == ranks * self.shard.shape[0]
        return even and (self.shard.ndim > 2 or self.shard.shape[0] % encoding.TILE == 0)

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy) -> tuple[tuple, Any]:
        """Return the tensors to gather, and for `fsdp_post_all_gather` the weight's size, None if they are FP8."""
        shard = self.shard.to(mp_policy.param_dtype or self.shard.dtype)
        if not (self.in_fp8 and mesh.size() > 1 and self.whole_blocks(mesh.size(), outer_size)):
            return (shard,), outer_size
        q, scale = encoding.quantize_128x128(shard)
        return (q.view(torch.uint8), scale), None

    def fsdp_post_all_gather(self, gathered: tuple[torch.Tensor, ...], size: torch.Size | None, dtype: torch.dtype, *,
                             out: torch.Tensor | None = None):
        """Return the weight, and the storages that FSDP frees and allocates with it; refill those of `out`."""
        if size is None:
            blocks = gathered[0].view(encoding.E4M3), gathered[1]
            transposed = tuple(part.mT.contiguous() if on_accelerator(part) else part.mT for part in blocks)
        else:
            blocks, transposed = encoding.quantize_both_ways(gathered[0][:size[0]])
            gathered[0].untyped_storage().resize_(0)  # nothing reads it; FSDP allocates it for the next gathering
        made = _storages((*blocks, *transposed), besides=gathered)
        if out is None:
            return Fp8Weight(blocks, transposed, dtype), made
        held = out._local_tensor if isinstance(out, DTensor) else out
        for old, new in zip(_storages((*held.blocks, *held.transposed), besides=gathered), made, strict=True):
            old.copy_(new)


def _storages(tensors: Iterable[torch.Tensor], besides: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the bytes under `tensors`, each storage once, without those of `besides`, which FSDP has already."""
    seen = {tensor.untyped_storage()._cdata for tensor in besides}
    found = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            found.append(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
    return found
