"""A tensor that is held and sent as FP8: E4M3 values with one scale for each 1x128 tile (encoding.py).

`BlockScaled` looks like a tensor of its `dtype`, so that autograd and dispatchers take it where rows are taken. FP8
products read its parts; gathers of rows and collectives move its parts; any other operator sees the tensor that was
quantised if it is at hand (`whole`), else the dequantised one. With powers of two as scales that is harmless:
quantising the dequantised tensor again gives the same values.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from megatron_deepseek.ops.fp8 import encoding
from megatron_deepseek.ops.permute import gather_rows

_aten = torch.ops.aten
_UNCHANGED = (_aten.detach.default, _aten.alias.default)


class BlockScaled(torch.Tensor):
    """`q` [..., K] float8_e4m3fn, `scale` [..., ceil(K / 128)] float32; `dtype` is what it stands for.

    `kept`: the same rows as the backward is to have them, if not as these tiles: E5M6 after attention.
    `whole`: the rows themselves, before they were quantised, for those who do not read tiles.
    `columns`: of a gradient, its 128x1 tiles (encoding.py), made with the others.
    """

    @staticmethod
    def __new__(cls, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, kept: tuple[torch.Tensor, ...] = (),
                whole: torch.Tensor | None = None, columns: encoding.Tiles | None = None):
        self = torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=dtype, device=q.device)
        self.q, self.scale, self.kept, self.whole, self.columns = q, scale, kept, whole, columns
        return self

    def again(self) -> "BlockScaled":
        """Another tensor of the same parts, as views are for autograd."""
        return BlockScaled(self.q, self.scale, self.dtype, self.kept, self.whole, self.columns)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "BlockScaled":
        """`function`, of rows, on the codes (as bytes, which every collective takes) and on the scales."""
        codes = function(self.q.view(torch.uint8)).view(encoding.E4M3)
        return BlockScaled(codes, function(self.scale), self.dtype)

    def plain(self) -> torch.Tensor:
        """What operators see that know no tiles."""
        return encoding.dequantize_1x128(self.q, self.scale, self.dtype) if self.whole is None else self.whole

    def __repr__(self) -> str:
        return f"BlockScaled({self.dtype}, {self.plain()!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in _UNCHANGED or function is _aten.view.default and list(args[1]) == list(args[0].shape):
            return args[0].again()
        if function is _aten.index_select.default and args[1] == 0 and type(args[2]) is torch.Tensor:
            return args[0].map(lambda part: gather_rows(part, args[2]))
        plain = torch.utils._pytree.tree_map_only(BlockScaled, BlockScaled.plain, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def quantize(x: torch.Tensor, power_of_two: bool = False) -> BlockScaled:
    """x [..., K] in 1x128 tiles, with no gradient; what is block-scaled already stays as it is."""
    return x if isinstance(x, BlockScaled) else BlockScaled(*encoding.quantize_1x128(x, power_of_two), x.dtype)


def map_rows(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`function` on x, or on each part that a block-scaled x is made of."""
    return x.map(function) if isinstance(x, BlockScaled) else function(x)


def parts_of(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The ordinary tensors that activations x are made of."""
    if not isinstance(x, BlockScaled):
        return (x,)
    return (x.q, x.scale, *x.kept, *(() if x.whole is None else (x.whole,)))


def apart(x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Callable[..., torch.Tensor]]:
    """`parts_of` activations x, and what makes x of such parts again; that holds none of them."""
    if not isinstance(x, BlockScaled):
        return (x,), lambda part: part
    return parts_of(x), partial(_together, x.dtype, len(x.kept))


def _together(dtype: torch.dtype, num_kept: int, q: torch.Tensor, scale: torch.Tensor, *others: torch.Tensor
              ) -> BlockScaled:
    return BlockScaled(q, scale, dtype, others[:num_kept], *others[num_kept:])


def bytes_of_row(x: torch.Tensor) -> int:
    """What one of the rows x[i] takes to hold or send."""
    return sum(math.prod(part.shape[1:]) * part.element_size() for part in parts_of(x))


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, power_of_two):
        return quantize(x, power_of_two)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def share(x: torch.Tensor, power_of_two: bool = False) -> torch.Tensor:
    """x as several FP8 products take it, quantised once; the gradient passes as if nothing had happened."""
    return x if isinstance(x, BlockScaled) else _Share.apply(x, power_of_two)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.whole.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def whole(x: torch.Tensor) -> torch.Tensor:
    """x as one who reads no tiles takes it: an ordinary tensor, with x's gradient."""
    return _Whole.apply(x) if isinstance(x, BlockScaled) and x.whole is not None else x
