"""AdamW over FSDP's shards, and the norm of the whole model's gradient.

Master weights and gradients are shards in the master dtype, moments in that or in bfloat16. Optimizer groups never mix
meshes, because fused updates work on lists of DTensors of one mesh.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_deepseek.model.architecture.adapters import B, factor_of
from megatron_deepseek.model.architecture.parameters import MATRIX, optimizer_group
from megatron_deepseek.parallel.shards import is_first_copy
from megatron_deepseek.parallel.sums import sum_numbers
from megatron_deepseek.settings import OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENT_DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # None: as the master weights, which are float32 outside tests

STRETCH_ELEMENTS = 1 << 22  # elements that are widened at a time: 16 MB for each moment
_VECTOR = 16  # elements: a cache line of float32, in multiples of which the fused CPU kernel divides its work


@dataclass(frozen=True, eq=False)
class NamedParameter:
    """A parameter and its name. `counted` is false for further copies of a parameter that several stages hold."""

    name: str
    parameter: nn.Parameter
    counted: bool = True


class ShardedAdamW(torch.optim.AdamW):
    """AdamW whose update sees the local shards of DTensors; state and parameters stay DTensors.

    The update is elementwise, so no rank needs more than its shards. Given DTensors, the first step spent most of its
    time working out how to shard the update: 0.2 s of processor time a rank for a model of 4 layers.

    Moments exist from the start, so that a checkpoint can be loaded or saved before the first step. `moment_dtypes` are
    those of exp_avg and exp_avg_sq, None for the parameter's own.
    """

    def __init__(self, groups: list[dict], moment_dtypes: tuple[torch.dtype | None, torch.dtype | None], **options):
        super().__init__(groups, **options)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            state = self.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name, dtype in zip(MOMENTS, moment_dtypes, strict=True):
                state[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)

    def _init_group(self, group, *lists) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return has_complex


class NarrowMomentsAdamW(ShardedAdamW):
    """AdamW with moments in fewer bits than the weights, as DeepSeek-V3 was trained (report, section 3.3.2).

    Each step widens them to the weights' dtype, updates by the fused kernel, and rounds to nearest, ties to even: a
    function of each element alone, so a layout changes no bit. The update goes through the shards in batches of
    stretches, so that the widened copies take little memory.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        for group in self.param_groups:
            params, grads, exp_avgs, exp_avg_sqs, steps = [], [], [], [], []
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
            if not steps:
                continue
            torch._foreach_add_(steps, 1)
            shards = zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
            for batch in _batches(stretch for shard in shards for stretch in _stretches(*shard)):
                _update(batch, group)


@dataclass(frozen=True, eq=False)
class _Stretch:
    """A stretch of one parameter's local shard, as one-dimensional views; `step` is that of the whole parameter."""

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor

    def widened(self) -> tuple[torch.Tensor, ...]:
        """Return parameter, gradient and moments in the parameter's dtype, padded to whole vectors.

        A tensor that needs neither is returned itself.

        The fused kernel rounds the last elements of a tensor, those that fill no vector, otherwise than the rest (with
        one multiplication and addition fused). With padding no element's bits depend on where a layout cuts.
        """
        wide = (self.param, self.grad, *(m.to(self.param.dtype) for m in (self.exp_avg, self.exp_avg_sq)))
        missing = -self.param.numel() % _VECTOR
        return tuple(F.pad(t, (0, missing)) for t in wide) if missing else wide

    def store(self, param: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
        """Store the updated copies of `widened`, rounded to this stretch's own dtypes."""
        for own, new in ((self.param, param), (self.exp_avg, exp_avg), (self.exp_avg_sq, exp_avg_sq)):
            if new is not own:
                own.copy_(new[:own.numel()])


def _stretches(*shard: torch.Tensor) -> Iterator[_Stretch]:
    *tensors, step = shard
    for parts in zip(*(t.view(-1).split(STRETCH_ELEMENTS) for t in tensors), strict=True):
        if parts[0].numel():
            yield _Stretch(*parts, step)


def _batches(stretches: Iterable[_Stretch]) -> Iterator[list[_Stretch]]:
    """Yield lists of stretches, of at most 2 * STRETCH_ELEMENTS elements together."""
    batch, size = [], 0
    for stretch in stretches:
        batch.append(stretch)
        size += stretch.param.numel()
        if size >= STRETCH_ELEMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _update(batch: list[_Stretch], group: dict) -> None:
    params, grads, exp_avgs, exp_avg_sqs = map(list, zip(*(stretch.widened() for stretch in batch)))
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], [stretch.step for stretch in batch], lr=group["lr"],
                        beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                        amsgrad=False, maximize=False)
    for stretch, *updated in zip(batch, params, exp_avgs, exp_avg_sqs):
        stretch.store(*updated)


def build_optimizer(parameters: Iterable[NamedParameter], settings: OptimizerSettings) -> ShardedAdamW:
    """Build AdamW in which matrices decay and vectors (norm weights, biases) do not, as in Megatron-LM.

    The learning rate of LoRA's B is a multiple of the others' (LoRA+). A rank may have no parameters.
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for item in parameters:
        decays = optimizer_group(item.parameter.shape) == MATRIX
        ratio = settings.lora_plus_ratio if factor_of(item.name) == B else 1.0
        groups.setdefault((item.parameter.device_mesh, decays, ratio), []).append(item.parameter)
    moment_dtypes = MOMENT_DTYPES[settings.exp_avg_dtype], MOMENT_DTYPES[settings.exp_avg_sq_dtype]
    kind = ShardedAdamW if moment_dtypes == (None, None) else NarrowMomentsAdamW
    return kind(
        [{"params": params, "weight_decay": settings.weight_decay if decays else 0.0, "lr_ratio": ratio}
         for (_, decays, ratio), params in groups.items()] or [{"params": [], "lr_ratio": 1.0}],
        moment_dtypes, lr=0.0, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps, fused=True)


def counts_in_norm(item: NamedParameter) -> bool:
    """Return whether this rank's shard counts in the norm: of TP replicas and of stage copies only the first does."""
    gradient = item.parameter.grad
    return item.counted and gradient is not None and is_first_copy(gradient)


@torch.no_grad()
def squared_gradient_norm(parameters: Iterable[NamedParameter], device: torch.device) -> torch.Tensor:
    """Return this rank's part of the squared Euclidean norm of the whole model's gradient, in float64.

    Of replicas one rank counts, so that in the sum over all ranks each parameter counts once.
    """
    return _sum_of_squares([item.parameter.grad for item in parameters if counts_in_norm(item)], device)


@torch.no_grad()
def parameter_norm(parameters: Iterable[NamedParameter], device: torch.device) -> float:
    """Return the Euclidean norm of all that is trained, of squares in float64; each parameter counts once."""
    counted = [item.parameter for item in parameters if item.counted and is_first_copy(item.parameter)]
    return math.sqrt(sum_numbers([_sum_of_squares(counted, device)], device)[0])


def _sum_of_squares(tensors: Iterable[DTensor], device: torch.device) -> torch.Tensor:
    """Return the sum over this rank's shards, in float64."""
    shards = [shard for shard in (tensor.to_local() for tensor in tensors) if shard.numel()]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if shards:
        total += torch.stack(torch._foreach_norm(shards)).double().square().sum()
    return total


@torch.no_grad()
def count_zeros(parameters: Iterable[NamedParameter], device: torch.device) -> int:
    """Return how many numbers of the gradient of the whole model are 0; each parameter counts once."""
    shards = [item.parameter.grad.to_local() for item in parameters if counts_in_norm(item)]
    return int(sum_numbers([sum((shard == 0).sum() for shard in shards)], device)[0])


@torch.no_grad()
def clip_gradients(parameters: Iterable[NamedParameter], norm: float, max_norm: float) -> None:
    """Scale every gradient by max_norm / norm where the norm is larger."""
    scale = max_norm / (norm + 1e-6)
    if scale < 1.0:
        shards = [item.parameter.grad.to_local() for item in parameters if item.parameter.grad is not None]
        if shards:
            torch._foreach_mul_(shards, scale)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_ratio"]
