"""A base with adapters merged into it, as a source of a conversion: W + sum of weight * scale * B A.

Nothing but a block of rows of W exists at a time, with the whole A and the same rows of B. The sum is made in float32,
from FP8 dequantised and, for FP8, quantised again with scales of its own: adding to the codes, or keeping the scales,
would be wrong wherever a block's largest number moves.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.adapter.peft_files import CONFIG, Adapter, Pair
from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.blocks import FP8, cast, row_ranges
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.safetensors_file import as_bytes
from megatron_deepseek.near_names import near_names


@dataclass(frozen=True)
class Weighted:
    """An adapter and what its part of the sum is multiplied by."""

    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class MergedSource:
    """`base` with the `pairs` of adapters added, which are by tensor name, each with its whole factor."""

    base: TensorSource
    pairs: Mapping[str, Sequence[tuple[Pair, float]]]
    adapter_files: Sequence[Path] = field(default=())

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def config(self):
        return self.base.config

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.base.shapes

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return self.base.dtypes

    @property
    def copies(self) -> dict[str, str]:
        return self.base.copies

    @property
    def dropped(self) -> dict[str, str]:
        return self.base.dropped

    @property
    def absent_mtp(self) -> int:
        return self.base.absent_mtp

    def files(self) -> list[Path]:
        return [*self.base.files(), *self.adapter_files]

    @cached_property
    def rescales(self) -> bool:
        """Return whether FP8 weights get scales that are not the base's."""
        return any(self.dtypes[name] == FP8 for name in self.pairs)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self.base.read(name, start, stop)
        if name not in self.pairs:
            return rows
        wide = torch.promote_types(rows.dtype, torch.float32)
        rows = rows.to(wide)
        for pair, factor in self.pairs[name]:
            rows = rows + factor * (pair.b.read(start, stop).to(wide) @ pair.a.read().to(wide))
        return rows

    def stream(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        if name not in self.pairs:
            yield from self.base.stream(name, start, stop)
            return
        for first, last in row_ranges(self.shapes[name], start, stop):
            yield as_bytes(cast(name, self.read(name, first, last), self.dtypes[name]).contiguous())

    def read_fp8(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in self.pairs:
            return self.base.read_fp8(name, start, stop)
        try:
            return block_fp8.quantize(self.read(name, start, stop))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def merged(base: TensorSource, adapters: Sequence[Weighted]) -> MergedSource:
    """Return the base with all of `adapters`. Raise ValueError for one of layers that it has not, or of other shapes.
    """
    pairs, files = defaultdict(list), []
    for weighted in adapters:
        adapter = weighted.adapter
        for layer, pair in adapter.pairs.items():
            name = f"{layer}.weight"
            _check(base, adapter, name, pair)
            pairs[name].append((pair, weighted.weight * pair.scale))
        files += [adapter.directory / CONFIG, *sorted({each.stored.file for pair in adapter.pairs.values()
                                                       for each in (pair.a, pair.b)})]
    return MergedSource(base, dict(pairs), tuple(files))


def _check(base: TensorSource, adapter: Adapter, name: str, pair: Pair) -> None:
    layer = name.removesuffix(".weight")
    if name not in base.shapes:
        near = near_names(name, base.shapes)
        more = f"; it has {near[0].removesuffix('.weight')}" if near else ""
        raise adapter.fault(f"adapts {layer}, which {base.path} has not{more}")
    found = pair.b.shape[0], pair.a.shape[1]
    if found != tuple(base.shapes[name]):
        raise adapter.fault(f"adapts {layer} as {found[0]} x {found[1]}, in {base.path} it is "
                            f"{' x '.join(map(str, base.shapes[name]))}")
