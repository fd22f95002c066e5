"""Products with an adapter of LoRA beside them (arXiv 2106.09685): W x + scale * B (A x).

`AdaptedGemm` is a GEMM like any other (precision_recipe.py), made of the GEMM of W and the products of A and B. So no
layer knows whether it has an adapter: it names its GEMM, and that decides. W is frozen and may be in FP8; A and B are
multiplied in the layer's own dtype. They see the same x and the same gradient as W, in FP8 the numbers of the tiles:
whether a layer is given tiles, or makes them itself, depends on the layout. In training A may see x with some features
dropped, as PEFT's does; which, depends on the keys of the rows (ops/dropout.py).

Shapes: R rows, E experts, I inputs, O outputs, r rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_deepseek.ops.dropout import Dropout
from megatron_deepseek.ops.precision_recipe import Deferred, Functions, GateUp, Gemm, GemmOver, Linear
from megatron_deepseek.ops.recompute import recomputed


@dataclass(frozen=True)
class LowRank:
    """scale * B (A x). `a` and `b` return this rank's A [r, I] and B [O, r], of experts [E, r, I] and [E, O, r].

    `down` multiplies by A, `up` by B. With two `matrices`, as gate and up of experts, A and B have the rows of one
    before those of the other, and each B reads the outputs of its own A.

    `dropout` is what A's input loses in training, None for nothing; `drop` is the same bound to the keys of rows.
    """

    a: Callable[[], torch.Tensor]
    b: Callable[[], torch.Tensor]
    scale: float
    down: Linear
    up: Linear
    matrices: int = 1
    dropout: Dropout | None = None
    drop: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, *counts: list[int]) -> torch.Tensor:
        if self.drop is None:
            return self._up(self.down(x, self.a(), *counts), *counts)
        with recomputed(self.drop, x) as dropped:  # x is kept, which other layers keep too
            return self._up(self.down(dropped, self.a(), *counts), *counts)

    def after_swiglu(self, gate_up: GateUp, *counts: list[int]) -> torch.Tensor:
        """Return it of the input silu(gate) * up, which is made again for A's gradient."""
        with recomputed(self.down.swiglu, *gate_up) as hidden:
            return self(hidden, *counts)

    def keyed(self, keys: torch.Tensor | None) -> "LowRank":
        """Return the same products for rows of these keys, which drop features; without keys nothing is dropped."""
        if self.dropout is None or keys is None:
            return self
        return replace(self, drop=partial(self.dropout, keys_R=keys))

    def _up(self, hidden: torch.Tensor, *counts: list[int]) -> torch.Tensor:
        hidden, b = hidden * self.scale, self.b()
        if self.matrices == 1:
            return self.up(hidden, b, *counts)
        parts = zip(hidden.chunk(self.matrices, -1), b.chunk(self.matrices, -2))
        return torch.cat([self.up(part.contiguous(), own, *counts) for part, own in parts], -1)

    def compiled(self, functions: Functions) -> "LowRank":
        """Return the same products with SwiGLU taken from `functions`."""
        return replace(self, down=self.down.compiled(functions), up=self.up.compiled(functions))

    def deferring(self, deferred: Deferred) -> "LowRank":
        """Return the same products with the gradients of A and B left to `deferred`."""
        return replace(self, down=self.down.deferring(deferred), up=self.up.deferring(deferred))


@dataclass(frozen=True)
class AdaptedGemm(GemmOver):
    """The GEMM `base`, with `adapter` added to its result."""

    adapter: LowRank

    def __call__(self, x, weight, *counts):
        delta = self.adapter(self.base.seen(x), *counts)
        return self.base(x, weight, *counts) + self.base.gradient_seen(delta)

    def after_swiglu(self, gate_up, weight, *counts):
        if self.base.activate is not None:  # SwiGLU is computed once, and kept for A where it is kept for W
            with self.base.activate(self.adapter.down.swiglu, *gate_up) as hidden:
                return self(hidden, weight, *counts)
        delta = self.adapter.after_swiglu(gate_up, *counts)
        return self.base.after_swiglu(gate_up, weight, *counts) + self.base.gradient_seen(delta)

    def deferring(self, deferred):
        return AdaptedGemm(self.base.deferring(deferred), self.adapter.deferring(deferred))

    def compiled(self, functions):
        return AdaptedGemm(self.base.compiled(functions), self.adapter.compiled(functions))

    def keyed(self, keys):
        adapter = self.adapter.keyed(keys)
        return self if adapter is self.adapter else AdaptedGemm(self.base, adapter)

    @property
    def gathered(self):
        """Return what makes the form in which FSDP gathers W; A and B are gathered as they are."""
        return self.base.gathered


def adapted(base: Gemm, a: Callable[[], torch.Tensor], b: Callable[[], torch.Tensor], scale: float,
            kind: type[Linear] = Linear, matrices: int = 1, dropout: Dropout | None = None) -> AdaptedGemm:
    """Return `base` with an adapter; `kind` is Grouped for experts."""
    return AdaptedGemm(base, LowRank(a, b, scale, kind(), kind(), matrices, dropout))
