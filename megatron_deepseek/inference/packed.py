"""Weights in the order in which oneDNN reads them, for products of few rows on the CPU.

Decoding multiplies a few tokens by every weight, and its speed is that of reading them. With 8 rows, a product by an
ordinary weight took 1.6 times as long as one by a packed weight, in float32 and in bfloat16 (2048 x 1024, one core of
an EPYC with AVX512). The packed copy takes the place of the weight, so memory stays the same.

Shapes: R rows, N outputs, K inputs, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megatron_deepseek.inference.quantised import HeldWeight, exchange
from megatron_deepseek.model.attention.mla import MLA
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.moe import Experts
from megatron_deepseek.ops.rounded_rows import round_up
from megatron_deepseek.parallel.tensor import ParallelLinear
from megatron_deepseek.torch_private import multiplies_bfloat16, multiply_packed, pack_weight

ROWS = 8  # for how many rows weights are packed; other numbers are right too


@dataclass(frozen=True, eq=False)
class PackedWeight(HeldWeight):
    """`packed` has one matrix, or one for each expert; `size` is that of the weight, [N, K] or [E, N, K]."""

    packed: tuple[torch.Tensor, ...]
    size: torch.Size

    @classmethod
    def pack(cls, weight: torch.Tensor) -> "PackedWeight":
        matrices = weight.unbind() if weight.dim() == 3 else (weight,)
        return cls(tuple(pack_weight(each.contiguous(), ROWS) for each in matrices), weight.shape)

    def multiply(self, x):
        return multiply_packed(x, self.packed[0])

    def multiply_grouped(self, rows_RK, counts):
        parts = [_multiply_rounded(rows, self.packed[expert])
                 for expert, rows in enumerate(rows_RK.split(counts)) if len(rows)]
        return torch.cat(parts) if parts else rows_RK.new_empty(0, self.size[-2])

    def dense(self, dtype):
        found = [each.to_dense().to(dtype) for each in self.packed]
        return torch.stack(found) if len(self.size) == 3 else found[0]

    @property
    def shape(self):
        return self.size

    @property
    def nbytes(self):
        return sum(each.nbytes for each in self.packed)


def _multiply_rounded(rows_RK: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Return the product of any number of rows; oneDNN compiles a kernel for every new number, in bfloat16 slowly."""
    return multiply_packed(round_up(rows_RK), packed)[:len(rows_RK)]


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of packed weights exist here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and multiplies_bfloat16()


def pack(stage: DeepseekStage) -> None:
    """Pack every weight that is only multiplied by and is still an ordinary tensor, one after the other."""
    for module, name in list(_weights(stage)):
        weight = getattr(module, name)
        if isinstance(weight, torch.Tensor) and can_pack(weight.device, weight.dtype):
            exchange(module, name, PackedWeight.pack(weight.detach()))


def _weights(stage: DeepseekStage) -> Iterator[tuple[nn.Module, str]]:
    """Yield linear layers and stacked experts with the names of their weights.

    Absorbed attention reads W_kvb itself, and a tied head's weight is the embedding's.
    """
    read = {id(module.kv_b_proj) for module in stage.modules() if isinstance(module, MLA)}
    for module in stage.modules():
        if isinstance(module, ParallelLinear) and id(module) not in read:
            yield module, "weight"
        elif isinstance(module, Experts):
            yield from ((module, "gate_up_proj"), (module, "down_proj"))
