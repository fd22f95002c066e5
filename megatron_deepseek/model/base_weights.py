"""Puts bytes in the place of the frozen weights of built stages, while these are on the meta device.

The weight keeps its name, and becomes uint8: codes. Beside it is NAME_scales. Both are frozen parameters with the
placements of the weight (model/architecture/base_weights.py), which FSDP shards and gathers like any others. The
weight's GEMM becomes one that knows what they stand for (ops/frozen_weight.py). What they hold is read from a base
(checkpoint/job/base_weights.py); until then it is what was in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard

from megatron_deepseek.model.architecture.base_weights import (
    FP8_BITS,
    SCALES,
    BaseSettings,
    FrozenShape,
    frozen_shape,
    quantised_rows,
    refuse_cut,
)
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import Parameter
from megatron_deepseek.model.architecture.placements import EP, ETP, TP
from megatron_deepseek.model.moe import COLUMN_PARALLEL, ROW_PARALLEL, Experts
from megatron_deepseek.ops.fp8.recipe import Fp8Gemm
from megatron_deepseek.ops.frozen_weight import Form, Fp8Form, Nf4Form, as_released, dequantising
from megatron_deepseek.ops.precision_recipe import Gemm
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.tensor import ParallelLinear, TensorParallel, local_weight, sharded_parameter


@dataclass(frozen=True, eq=False)
class HeldWeight:
    """A weight that is kept as bytes: `name` of `module`, its row of the table, and the columns that this rank has."""

    module: nn.Module
    name: str
    row: Parameter
    shape: FrozenShape
    form: Form
    columns: slice

    @property
    def codes(self) -> nn.Parameter:
        """Return this rank's shard of the codes."""
        return getattr(self.module, self.name)

    @property
    def scales(self) -> nn.Parameter:
        """Return this rank's shard of the scales."""
        return getattr(self.module, self.name + SCALES)


def check_torch(version: str = torch.__version__) -> None:
    """Raise ValueError for a torch whose FSDP cannot keep a parameter of bytes beside others: before 2.13 it asks every
    parameter to be able to have a gradient, and gathers bytes as bfloat16.
    """
    if tuple(map(int, version.split(".")[:2])) < (2, 13):
        raise ValueError(f"--quantization-bit needs torch 2.13 or later, whose FSDP keeps bytes; this is {version}")


def hold_base(stages: Iterable[nn.Module], config: ModelConfig, base: BaseSettings, layout: Layout, tp: TensorParallel
              ) -> None:
    """Keep the weights of linear layers and experts as bytes, and note them in the stages' `held`.

    Raise ValueError where ranks divide a weight inside a block.
    """
    rows = {row.name: row for row in quantised_rows(config)}
    ranks = {TP: layout.tp, EP: layout.ep, ETP: layout.etp}
    for row in rows.values():
        refuse_cut(row, base, ranks)
    for stage in stages:
        stage.base = base
        stage.held = tuple(
            _hold(module, name, rows[full_name], frozen_shape(rows[full_name], base, ranks), base, mesh, placements)
            for module, name, full_name, mesh, placements in _weights(stage, tp) if full_name in rows)


def _weights(stage: nn.Module, tp: TensorParallel
             ) -> Iterator[tuple[nn.Module, str, str, DeviceMesh, tuple[Placement, ...]]]:
    """Yield every weight of a linear layer or of experts with its full name, mesh and placements."""
    for path, module in list(stage.named_modules()):
        if isinstance(module, ParallelLinear):
            yield module, "weight", f"{path}.weight", tp.mesh, (module.placement,)
        elif isinstance(module, Experts):
            for name, placements in (("gate_up_proj", COLUMN_PARALLEL), ("down_proj", ROW_PARALLEL)):
                yield module, name, f"{path}.{name}", module.etp.mesh, placements


def _hold(module: nn.Module, name: str, row: Parameter, shape: FrozenShape, base: BaseSettings, mesh: DeviceMesh,
          placements: tuple[Placement, ...]) -> HeldWeight:
    for each, size in ((name, shape.codes), (name + SCALES, shape.scales)):
        setattr(module, each, sharded_parameter(size, mesh, *placements, dtype=torch.uint8))
    gemm = "gemm" if isinstance(module, ParallelLinear) else {"gate_up_proj": "up_gemm", "down_proj": "down_gemm"}[name]
    form = Fp8Form(shape.columns, by_row=shape.rows_of_scale == 1) if base.quantization_bit == FP8_BITS else \
        Nf4Form(shape.columns, base.double_quantization)
    setattr(module, gemm, _frozen(getattr(module, gemm), form, partial(_local, module, name + SCALES), row.name))
    axis = next((axis for axis, placement in enumerate(placements) if placement == Shard(len(row.shape) - 1)), None)
    start = 0 if axis is None else mesh.get_local_rank(axis) * shape.columns
    return HeldWeight(module, name, row, shape, form, slice(start, start + shape.columns))


def _local(module: nn.Module, name: str) -> torch.Tensor:
    return local_weight(getattr(module, name))


def _frozen(base: Gemm, form: Form, scales, name: str) -> Gemm:
    """Return the GEMM of a weight that is kept in `form`; of FP8 that of the FP8 recipe, where the model has it."""
    if not isinstance(base, Fp8Gemm):
        return dequantising(base, form, scales)
    if isinstance(form, Fp8Form) and not form.by_row:
        return as_released(base, form, scales)
    raise ValueError(f"{name}: FP8 products need whole blocks of 128 x 128 of FP8 on each rank")
