"""Dropout whose mask is a function of what a row is, of the stream's name and of the number of the feature alone.

So a token has the same mask on whichever rank, in whichever micro-batch and in however many forwards it is computed,
and nothing has to be stored for the backward: the mask is drawn again. One hash of 64 bits serves four features, so a
rate is rounded to a multiple of 2**-16.

Shapes: R rows (any leading dimensions), I features.
"""

from dataclasses import dataclass

import torch

from megatron_deepseek.ops.hashing import split_mix

_BITS = 16  # of a feature's random number
_EACH = 64 // _BITS  # features of a hash


@dataclass(frozen=True)
class Dropout:
    """Sets a feature of a row to zero with probability `rate`, and divides what is left by 1 - `rate`.

    `stream`: the key of the random numbers (ops/hashing.py). `first`: the number of the first feature, where a rank has
    a part of them.
    """

    rate: float
    stream: int
    first: int = 0

    @property
    def threshold(self) -> int:
        """Return how many of the 2**16 numbers mean that a feature is dropped."""
        return min(round(self.rate * 2**_BITS), 2**_BITS - 1)

    @property
    def factor(self) -> float:
        """Return what the features that are left are multiplied by."""
        return 1 / (1 - self.threshold / 2**_BITS)

    def mask(self, keys_R: torch.Tensor, width: int) -> torch.Tensor:
        """Return which of `width` features each row keeps, bool [R, I]; rows are known by int64 keys."""
        begin, end = self.first // _EACH, -(-(self.first + width) // _EACH)
        hash_W = torch.arange(begin, end, device=keys_R.device)
        numbers = split_mix(hash_W, split_mix(keys_R, self.stream).unsqueeze(-1)).view(torch.int16)
        skipped = self.first % _EACH
        return numbers[..., skipped:skipped + width] >= self.threshold - 2**(_BITS - 1)

    def __call__(self, x: torch.Tensor, keys_R: torch.Tensor) -> torch.Tensor:
        """Return x [R, I] with some features zero."""
        return _Drop.apply(x, keys_R, self)


class _Drop(torch.autograd.Function):
    """Saves the keys alone."""

    @staticmethod
    def forward(ctx, x, keys_R, dropout: Dropout):
        ctx.save_for_backward(keys_R)
        ctx.dropout = dropout
        return _dropped(x, keys_R, dropout)

    @staticmethod
    def backward(ctx, grad):
        (keys_R,) = ctx.saved_tensors
        return _dropped(grad, keys_R, ctx.dropout), None, None


def _dropped(x: torch.Tensor, keys_R: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    return (x * dropout.factor).where(dropout.mask(keys_R, x.shape[-1]), 0)
