"""Initial weights as a function of (seed, parameter name, global index) alone.

Every element is drawn by hashing its place in the whole parameter, so any layout starts from the same weights, a device
fills just the shard it holds, and copies of a parameter on several stages are equal without communication. The
generator is SplitMix64 (ops/hashing.py), followed by the Box-Muller transform.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_deepseek.model.architecture.adapters import A, B, factor_of
from megatron_deepseek.ops.hashing import ELEMENTS_AT_A_TIME, shift_right, split_mix, stream_key, uniform
from megatron_deepseek.parallel.shards import shard_regions


def normal(index: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    """Return a standard normal float64 for each int64 `index` of the parameter `name`."""
    bits = split_mix(index, stream_key(f"{seed}:{name}"))
    uniform_1 = (shift_right(bits, 32).double() + 0.5) / (1 << 32)
    uniform_2 = ((bits & 0xFFFFFFFF).double() + 0.5) / (1 << 32)
    return (-2 * uniform_1.log()).sqrt() * (2 * math.pi * uniform_2).cos()


def global_index(start: int, stop: int, shape: torch.Size, local_shape: torch.Size, offset: tuple[int, ...],
                 device: torch.device) -> torch.Tensor:
    """Return the places in a parameter of `shape` of elements start..stop of a flattened region at `offset`."""
    rest = torch.arange(start, stop, device=device)
    index, stride = torch.zeros_like(rest), 1
    for dim in reversed(range(len(shape))):
        index += (rest % local_shape[dim] + offset[dim]) * stride
        rest = rest // local_shape[dim]
        stride *= shape[dim]
    return index


def fill_normal(parameter: DTensor, std: float, seed: int, name: str) -> None:
    """Fill this rank's shard with its part of the parameter's normal(0, std) values."""
    fill(parameter, lambda index: normal(index, seed, name) * std)


def fill_uniform(parameter: DTensor, bound: float, seed: int, name: str) -> None:
    """Fill this rank's shard with its part of the parameter's values, uniform within +-bound."""
    key = stream_key(f"{seed}:{name}")
    fill(parameter, lambda index: (2 * uniform(index, key) - 1) * bound)


@torch.no_grad()
def fill(parameter: DTensor, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Fill this rank's shard with what `draw` makes of the places of its elements in the whole parameter, int64."""
    for region in shard_regions(parameter):
        for part in region.contiguous():
            flat = part.local.view(-1)
            for start in range(0, flat.numel(), ELEMENTS_AT_A_TIME):
                stop = min(start + ELEMENTS_AT_A_TIME, flat.numel())
                flat[start:stop] = draw(global_index(start, stop, parameter.shape, part.local.shape, part.offset,
                                                     flat.device))


@torch.no_grad()
def initialize(stages: Iterable[nn.Module], std: float, seed: int) -> None:
    """Set norm weights to one, biases to zero, all else to normal(0, std), as DeepSeek-V3 (report, section 4.2).

    Adapters begin as PEFT's: A uniform within +-1 / sqrt(inputs), B zero, so that they change nothing yet. Bytes, which
    weights are kept as, are left as they are.
    """
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if not parameter.is_floating_point():
                continue
            if name.endswith("norm.weight"):
                parameter.to_local().fill_(1.0)
            elif name.endswith(".bias") or factor_of(name) == B:
                parameter.to_local().zero_()
            elif factor_of(name) == A:
                fill_uniform(parameter, parameter.shape[-1]**-0.5, seed, name)
            else:
                fill_normal(parameter, std, seed, name)
        for buffer in stage.buffers():
            buffer.zero_()
