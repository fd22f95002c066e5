"""Comparing two checkpoints number by number, in memory that does not grow with them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf

import torch

from megatron_deepseek.checkpoint.dcp.files import DcpDirectory
from megatron_deepseek.checkpoint.dcp.item_reader import ItemReader
from megatron_deepseek.checkpoint.native import Checkpoint
from megatron_deepseek.parallel.regions import Region

_BLOCK_NUMBERS = 1 << 18


@dataclass(frozen=True)
class Difference:
    """How one tensor differs between checkpoints A and B.

    `reason` is None if it is bit for bit the same, else "missing in A", "missing in B", "shape", "dtype" or "numbers".
    `different` counts the numbers with other bits. `largest` is the largest |a - b|, `relative` the largest
    |a - b| / max(|a|, |b|). Both are infinite if one side is infinite or NaN where the other is something else.
    """

    name: str
    reason: str | None
    detail: str = ""
    different: int = 0
    largest: float = 0.0
    relative: float = 0.0


def compare(a: Checkpoint, b: Checkpoint, names: Sequence[str], workers: int,
            advance: Callable[[int], None]) -> list[Difference]:
    """Compare the tensors `names`, each in at least one of the two; `advance` is told the bytes read of `a`."""
    with ThreadPoolExecutor(workers, "compare") as pool:
        return list(pool.map(lambda name: _compare(a.stored, b.stored, name, advance), names))


def _compare(a: DcpDirectory, b: DcpDirectory, name: str, advance: Callable[[int], None]) -> Difference:
    if name not in a.shapes or name not in b.shapes:
        return Difference(name, "missing in A" if name in b.shapes else "missing in B")
    if a.shapes[name] != b.shapes[name]:
        return Difference(name, "shape", f"{list(a.shapes[name])} in A, {list(b.shapes[name])} in B")
    different, largest, relative = 0, 0.0, 0.0
    with ItemReader(a) as reader_a, ItemReader(b) as reader_b:
        for region in Region((0,) * len(a.shapes[name]), a.shapes[name]).contiguous_parts(_BLOCK_NUMBERS):
            x, y = reader_a.read(name, region), reader_b.read(name, region)
            advance(x.nbytes)
            if x.dtype == y.dtype and torch.equal(_bits(x), _bits(y)):
                continue
            different += int((_bits(x) != _bits(y)).sum()) if x.dtype == y.dtype else region.numel
            most, share = _distance(x.double(), y.double())
            largest, relative = max(largest, most), max(relative, share)
    if a.dtypes[name] != b.dtypes[name]:
        detail = f"{_name(a.dtypes[name])} in A, {_name(b.dtypes[name])} in B"
        return Difference(name, "dtype", detail, different, largest, relative)
    return Difference(name, "numbers" if different else None, "", different, largest, relative)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bits as integers of the same width: NaNs are equal if their bits are, and zeros differ by sign."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def _distance(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return the largest absolute and the largest relative difference of two float64 tensors."""
    same = (x == y) | (x.isnan() & y.isnan())
    absolute = (x - y).abs().nan_to_num(inf, inf).masked_fill(same, 0.0)
    relative = (absolute / torch.maximum(x.abs(), y.abs())).nan_to_num(inf, inf).masked_fill(same, 0.0)
    return absolute.max().item(), relative.max().item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
