"""A tensor that is held and sent as FP8: E4M3 codes with one scale for each 1x128 tile (encoding.py).

`BlockScaled` looks like a tensor of its `dtype`, so that autograd and dispatchers accept it as rows. FP8 GEMMs read its
parts; gathers of rows and collectives move its parts. Any other operator sees the tensor before quantisation if it is
held too (`whole`), else the dequantised one. With powers of two as scales that is harmless: quantising the dequantised
tensor again gives the same values.
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
    """`q` [..., K] float8_e4m3fn and `scale` [..., ceil(K / 128)] float32 that stand for a tensor of `dtype`.

    `kept`: the same rows in the format that is saved for the backward, if not these tiles: E5M6 after attention.
    `whole`: the rows themselves, before quantisation, for operators that do not read tiles. `columns`: of a gradient,
    its 128x1 tiles (encoding.py), made with the others.
    """

    @staticmethod
    def __new__(cls, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, kept: tuple[torch.Tensor, ...] = (),
                whole: torch.Tensor | None = None, columns: encoding.Tiles | None = None):
        self = torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=dtype, device=q.device)
        self.q, self.scale, self.kept, self.whole, self.columns = q, scale, kept, whole, columns
        return self

    def again(self) -> "BlockScaled":
        """Return another tensor of the same parts, as autograd wants of a view."""
        return BlockScaled(self.q, self.scale, self.dtype, self.kept, self.whole, self.columns)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "BlockScaled":
        """Apply `function`, of rows, to the codes (as bytes, which every collective takes) and to the scales."""
        codes = function(self.q.view(torch.uint8)).view(encoding.E4M3)
        return BlockScaled(codes, function(self.scale), self.dtype)

    def plain(self) -> torch.Tensor:
        """Return the ordinary tensor that operators see which know no tiles."""
        return encoding.dequantize_1x128(self.q, self.scale, self.dtype) if self.whole is None else self.whole

    def __repr__(self) -> str:
        return f"BlockScaled({self.dtype}, {self.plain()!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in _UNCHANGED or function is _aten.view.default and list(args[1]) == list(args[0].shape):
            return args[0].again()
        if function is _aten.index_select.default and args[1] == 0 and not isinstance(args[2], BlockScaled):
            return args[0].map(lambda part: part.index_select(0, args[2]))
        plain = torch.utils._pytree.tree_map_only(BlockScaled, BlockScaled.plain, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def plain(x: torch.Tensor) -> torch.Tensor:
    """Return x as an ordinary tensor, without a gradient."""
    return x.plain() if isinstance(x, BlockScaled) else x


def quantize(x: torch.Tensor, power_of_two: bool = False) -> BlockScaled:
    """Return x [..., K] in 1x128 tiles, without a gradient; x itself if it is block-scaled already."""
    return x if isinstance(x, BlockScaled) else BlockScaled(*encoding.quantize_1x128(x, power_of_two), x.dtype)


def take_rows(x: torch.Tensor, index_Q: torch.Tensor) -> torch.Tensor:
    """Return rows index_Q of x, [Q, ...], without a gradient: of tiles by `gather_rows`, a kernel on a GPU.

    `x.index_select` does the same in torch, for references, which never call a kernel.
    """
    return x.map(lambda part: gather_rows(part, index_Q)) if isinstance(x, BlockScaled) else x.index_select(0, index_Q)


def map_rows(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply `function` to x, or to codes and scales if x is block-scaled."""
    return x.map(function) if isinstance(x, BlockScaled) else function(x)


def parts_of(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the ordinary tensors of which activations x are made."""
    if not isinstance(x, BlockScaled):
        return (x,)
    return (x.q, x.scale, *x.kept, *(() if x.whole is None else (x.whole,)))


def apart(x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Callable[..., torch.Tensor]]:
    """Return `parts_of` activations x, and a function that makes x of such parts again and holds none of them."""
    if not isinstance(x, BlockScaled):
        return (x,), lambda part: part
    return parts_of(x), partial(_together, x.dtype, len(x.kept))


def _together(dtype: torch.dtype, num_kept: int, q: torch.Tensor, scale: torch.Tensor, *others: torch.Tensor
              ) -> BlockScaled:
    return BlockScaled(q, scale, dtype, others[:num_kept], *others[num_kept:])


def bytes_of_row(x: torch.Tensor) -> int:
    """Return how many bytes one of the rows x[i] takes to hold or send."""
    return sum(math.prod(part.shape[1:]) * part.element_size() for part in parts_of(x))


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, power_of_two):
        return quantize(x, power_of_two)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def share(x: torch.Tensor, power_of_two: bool = False) -> torch.Tensor:
    """Return x quantised once for several FP8 GEMMs; the gradient passes unchanged."""
    return x if isinstance(x, BlockScaled) else _Share.apply(x, power_of_two)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.whole.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def whole(x: torch.Tensor) -> torch.Tensor:
    """Return x as an ordinary tensor, with x's gradient, for operators that read no tiles."""
    return _Whole.apply(x) if isinstance(x, BlockScaled) and x.whole is not None else x


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return encoding.dequantize_1x128(x.q, x.scale, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


def dequantized(x: torch.Tensor) -> torch.Tensor:
    """Return the numbers that the tiles of x stand for as an ordinary tensor, with x's gradient."""
    return _Dequantized.apply(x)


class _DequantizedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, power_of_two):
        ctx.power_of_two = power_of_two
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        tiles = quantize(grad, ctx.power_of_two)
        return encoding.dequantize_1x128(tiles.q, tiles.scale, tiles.dtype), None


def with_dequantized_gradient(x: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """Return x; its gradient is the numbers that its tiles stand for, as an ordinary tensor, whether it comes in tiles
    or is quantised here.
    """
    return _DequantizedGradient.apply(x, power_of_two)
