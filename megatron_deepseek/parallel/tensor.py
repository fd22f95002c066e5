"""Tensor and sequence parallelism: sharded linear layers and the collectives at the edges of a sharded region.

A region of tensor-parallel weights is entered once and left once (arXiv 1909.08053, 2205.05198):

                        entering                            leaving (partial sums over TP)
  no sequence parallel  identity      / backward all-reduce     all-reduce     / backward identity
  sequence parallel     all-gather S  / backward reduce-scatter reduce-scatter / backward all-gather

Weights are DTensors on the TP mesh and compute on their local shards. `to_local(grad_placements=...)` states what the
local gradient is: complete for a slice of a sharded weight; partial for a replicated weight that saw only this rank's
slice of the sequence, and then FSDP sums it over TP when it reduces.

Shapes: B batch, S sequence (local slice under sequence parallelism), H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from megatron_deepseek.ops.norm import rms_norm
from megatron_deepseek.ops.precision_recipe import Gemm, Linear
from megatron_deepseek.parallel.collectives import (
    CopyToTensorRanks,
    JoinTokens,
    SplitTokens,
    SumOverTensorRanks,
    gather_sum,
    scatter_sum,
)

SEQUENCE_DIM = 1


@dataclass(frozen=True, eq=False)
class TensorParallel:
    """The TP mesh of this rank and whether activations between regions (the stream) are sharded along the sequence."""

    mesh: DeviceMesh
    sequence_parallel: bool

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def activation_grad(self) -> Placement:
        """Return what the local gradient of a replicated weight is whose input is the stream between regions."""
        return Partial() if self.sequence_parallel and self.size > 1 else Replicate()

    def enter(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Bring the stream between regions to the whole sequence, the input of column-parallel weights."""
        if self.size == 1:
            return x_BSH
        return gather_sum(x_BSH, SEQUENCE_DIM, self.group) if self.sequence_parallel else CopyToTensorRanks.apply(
            x_BSH, self.group)

    def leave(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Bring partial sums of row-parallel weights back to the stream between regions."""
        if self.size == 1:
            return x_BSH
        return scatter_sum(x_BSH, SEQUENCE_DIM, self.group) if self.sequence_parallel else SumOverTensorRanks.apply(
            x_BSH, self.group)

    def own_tokens(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of the sequence, which under sequence parallelism is the stream itself."""
        if self.size == 1 or self.sequence_parallel:
            return x_BSH
        return SplitTokens.apply(x_BSH, SEQUENCE_DIM, self.group)

    def whole_sequence(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Bring the stream to the whole sequence on every TP rank, where all compute the same with it from there on."""
        return JoinTokens.apply(x_BSH, SEQUENCE_DIM, self.group) if self.size > 1 and self.sequence_parallel else x_BSH

    def own_keys(self, keys_BS: torch.Tensor | None) -> torch.Tensor | None:
        """Return, of what every TP rank knows of the tokens of the whole sequence, the part of `own_tokens`."""
        return keys_BS if keys_BS is None or self.size == 1 else keys_BS.chunk(self.size, SEQUENCE_DIM)[self.rank]

    def stream_keys(self, keys_BS: torch.Tensor | None) -> torch.Tensor | None:
        """Return, of what every TP rank knows of the tokens of the whole sequence, the part of the stream."""
        return self.own_keys(keys_BS) if self.sequence_parallel else keys_BS

    def all_tokens(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Undo `own_tokens`."""
        if self.size == 1 or self.sequence_parallel:
            return x_BSH
        return JoinTokens.apply(x_BSH, SEQUENCE_DIM, self.group)


def sharded_parameter(shape: tuple[int, ...], mesh: DeviceMesh, *placements: Placement,
                      dtype: torch.dtype | None = None) -> nn.Parameter:
    """Return an uninitialised parameter of global `shape`, on the default device, as this rank's shard of a DTensor.

    Of integers it is frozen. On a mesh of one rank it is an ordinary parameter: DTensor's dispatch was 7 % of a small
    model's step on CPU. Raise ValueError if a sharded dimension is not a multiple of the mesh axis's size.
    """
    local, stride = list(shape), torch.empty(shape, device="meta").stride()
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if local[placement.dim] % mesh.size(axis):
            raise ValueError(f"dimension {placement.dim} of a weight of shape {tuple(shape)} is not a multiple of "
                             f"the {mesh.size(axis)} ranks of {mesh.mesh_dim_names[axis]}")
        local[placement.dim] //= mesh.size(axis)
    empty = torch.empty(local, dtype=dtype)
    if mesh.size() > 1:
        empty = DTensor.from_local(empty, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return nn.Parameter(empty, requires_grad=empty.is_floating_point())


def local_weight(parameter: nn.Parameter, *gradient: Placement) -> torch.Tensor:
    """Return the shard that this rank computes with; `gradient` states what its local gradient is of the whole."""
    return parameter.to_local(grad_placements=gradient) if isinstance(parameter, DTensor) else parameter


class ParallelLinear(nn.Module):
    """y = x W^T (+ b) on the local shard of W [out, in].

    `weight_grad` states what the weight's local gradient is of the whole. `gemm` decides the precision, and when the
    weight's gradient is computed (ops/precision_recipe.py).

    A bias has the layout of the outputs, and is added by `add_bias`, to a complete output only: with row-parallel
    weights after leaving the region.
    """

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, placement: Placement,
                 weight_grad: Placement, bias: bool = False, gemm: Gemm = Linear()):
        super().__init__()
        self.weight = sharded_parameter((out_features, in_features), tp.mesh, placement)
        self.gemm, self.placement = gemm, placement
        self.weight_grad = weight_grad
        of_sum = placement == Shard(1)  # the bias is added once, on the stream between regions
        self.bias_grad = tp.activation_grad if of_sum else weight_grad
        self.bias = sharded_parameter((out_features,), tp.mesh, Replicate() if of_sum else placement) if bias else None

    def local_weight(self) -> torch.Tensor:
        """Return this rank's shard."""
        return local_weight(self.weight, self.weight_grad)

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output; `keys` are those of x's rows (`Gemm.keyed`)."""
        return self.gemm.keyed(keys)(x, self.local_weight())

    @property
    def weight_gemms(self) -> dict[str, Gemm]:
        """Return the GEMM that alone reads a weight, by the weight's name (parallel/data.py)."""
        return {"weight": self.gemm}

    def after_swiglu(self, *gate_up: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output for the input silu(gate) * up."""
        return self.gemm.keyed(keys).after_swiglu(gate_up, self.local_weight())

    def add_bias(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.bias is None else y + local_weight(self.bias, self.bias_grad)


class PieceLinear(ParallelLinear):
    """A column-parallel layer with a bias within, whose outputs are cut between `pieces` only, as into heads of keys.

    Its input is the whole sequence (`enter`). Where the ranks are a multiple of the pieces, each piece is for several
    ranks: all of them hold the whole weight, compute all outputs and keep their piece, so that what each has of the
    gradient is a part of a sum over TP. Raise ValueError where neither number is a multiple of the other.
    """

    def __init__(self, in_features: int, out_features: int, pieces: int, tp: TensorParallel, bias: bool = False,
                 gemm: Gemm = Linear()):
        divided = pieces % tp.size == 0
        if not divided and tp.size % pieces:
            raise ValueError(f"{pieces} heads of keys and values are neither a multiple of the {tp.size} ranks of tp "
                             f"nor a divisor of it")
        placement, weight_grad = (Shard(0), Shard(0)) if divided else (Replicate(), Partial())
        super().__init__(in_features, out_features, tp, placement, weight_grad, bias, gemm)
        width = out_features // pieces
        start = 0 if divided else tp.rank * pieces // tp.size * width
        self.own = None if divided else slice(start, start + width)

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        y = self.add_bias(super().forward(x, keys))
        return y if self.own is None else y[..., self.own]


def column_linear(in_features: int, out_features: int, tp: TensorParallel, gemm: Gemm = Linear()
                  ) -> ParallelLinear:
    """Return a linear layer whose outputs are sharded over TP; its input is the whole sequence (`enter`)."""
    return ParallelLinear(in_features, out_features, tp, Shard(0), Shard(0), gemm=gemm)


def row_linear(in_features: int, out_features: int, tp: TensorParallel, bias: bool = False,
               gemm: Gemm = Linear()) -> ParallelLinear:
    """Return a linear layer whose inputs are sharded over TP; its output is a partial sum (`leave`)."""
    return ParallelLinear(in_features, out_features, tp, Shard(1), Shard(1), bias, gemm)


def replicated_linear(in_features: int, out_features: int, tp: TensorParallel, bias: bool = False,
                      gemm: Gemm = Linear()) -> ParallelLinear:
    """Return a linear layer with the same weight on every TP rank, applied to the stream between regions."""
    return ParallelLinear(in_features, out_features, tp, Replicate(), tp.activation_grad, bias, gemm)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, computed in at least float32 (arXiv 1910.07467), weight replicated.

    `form` computes it: plain, or with y in FP8 tiles (ops/precision_recipe.py). `weight_grad` states what the weight's
    local gradient is of the whole; None where the norm is on the stream between regions.
    """

    def __init__(self, size: int, eps: float, tp: TensorParallel, form: Callable[..., torch.Tensor] = rms_norm,
                 weight_grad: Placement | None = None):
        super().__init__()
        self.weight = sharded_parameter((size,), tp.mesh, Replicate())
        self.weight_grad = weight_grad or tp.activation_grad
        self.eps, self.form = eps, form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form(x, local_weight(self.weight, self.weight_grad), self.eps)
