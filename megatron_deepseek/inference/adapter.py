"""A LoRA adapter of PEFT beside the base weights of a model that answers.

Each adapted linear layer gets W + scale * B A as its weight (quantised.py). W may be plain, FP8 or NF4, and is not
changed. Under tensor parallelism a rank takes the rows of B or the columns of A that its part of W has, so that sums
over ranks stay what they are. The files are those of checkpoint/adapter/peft_files.py.
"""

import torch
from torch import nn

from megatron_deepseek.checkpoint.adapter.peft_files import Adapter
from megatron_deepseek.inference.quantised import AdaptedWeight, exchange, held_weight
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.parallel.tensor import ParallelLinear


def attach(adapter: Adapter, stage: nn.Module, meshes: Meshes, dtype: torch.dtype) -> None:
    """Put the adapter beside this rank's weights. Raise ValueError for a layer that the model has not, or of another
    shape.
    """
    linears = {name: module for name, module in stage.named_modules() if isinstance(module, ParallelLinear)}
    for name, pair in adapter.pairs.items():
        if name not in linears or name == "lm_head":
            raise ValueError(f"--adapter {adapter.directory} adapts {name}, which is no linear layer of this model's "
                             "attention, MLPs or shared experts; merge the adapter into its base instead")
        base = held_weight(linears[name])
        a, b = (factor.read().to(meshes.device, dtype) for factor in (pair.a, pair.b))
        a, b = (_own(each, dim, base.shape[dim], meshes, adapter, name) for each, dim in ((a, 1), (b, 0)))
        exchange(linears[name], "weight", AdaptedWeight(base, a, b, pair.scale))


def _own(whole: torch.Tensor, dim: int, size: int, meshes: Meshes, adapter: Adapter, name: str) -> torch.Tensor:
    """Return this rank's `size` rows or columns of A or B; all of them where the base has all."""
    if whole.shape[dim] == size:
        return whole
    if whole.shape[dim] != size * meshes.layout.tp:
        raise ValueError(f"--adapter {adapter.directory}: {name} has {whole.shape[dim]} "
                         f"{'inputs' if dim else 'outputs'} there, the model's has {size * meshes.layout.tp}")
    return whole.narrow(dim, meshes.rank("tp") * size, size).contiguous()
