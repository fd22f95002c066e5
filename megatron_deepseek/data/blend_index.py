"""The index of a blend: which dataset each sample comes from, always the one that is furthest behind its weight.

The rule and the compiled loop are those of megatron-core's BlendedDataset. An index is a file of int64[size] sample
numbers within their datasets, then int16[size] datasets, and a seal (cache.py). A longer index begins with the shorter
one, so that it serves a shorter run too.
"""

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from megatron_deepseek.data.cache import SEAL_BYTES, sealing
from megatron_deepseek.data.index_file import mapped


@dataclass(frozen=True)
class BlendIndex:
    """An index of `size` samples or more of datasets with `weights`, which add up to 1."""

    weights: tuple[float, ...]
    size: int

    @property
    def name(self) -> str:
        return hashlib.blake2b(json.dumps(self.weights).encode(), digest_size=16).hexdigest()

    def find(self, folder: Path) -> tuple[Path, int] | None:
        """Return the smallest index in `folder` that is large enough, and its size; None where there is none."""
        found = []
        for path in folder.glob(f"{self.name}-*.blend"):
            size = path.stem.rpartition("-")[2]
            if size.isdecimal() and int(size) >= self.size and path.stat().st_size == 10 * int(size) + SEAL_BYTES:
                found.append((int(size), path))
        return min(found)[::-1] if found else None

    def build(self, folder: Path):
        """Write the index of exactly `size` samples."""
        datasets, numbers = np.zeros(self.size, np.int16), np.zeros(self.size, np.int64)
        weights = np.array(self.weights) / np.sum(self.weights)  # once more, as megatron-core does
        _helpers().build_blending_indices(datasets, numbers, weights, len(weights), self.size, False)
        with sealing(folder / f"{self.name}-{self.size}.blend") as file:
            file.write(numbers.astype("<i8", copy=False).data)
            file.write(datasets.astype("<i2", copy=False).data)

    def map(self, folder: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return (datasets, sample numbers), int16 and int64 [size or more], mapped from the file."""
        path, size = self.find(folder)
        return mapped(path, "<i2", 8 * size, size), mapped(path, "<i8", 0, size)


def _helpers():
    """Return megatron-core's compiled helpers, loaded alone: importing megatron.core takes 3 to 7 s on every rank."""
    megatron = importlib.util.find_spec("megatron")
    for place in megatron.submodule_search_locations if megatron else ():
        for suffix in EXTENSION_SUFFIXES:
            path = Path(place) / "core" / "datasets" / f"helpers_cpp{suffix}"
            if path.exists():
                spec = importlib.util.spec_from_file_location("helpers_cpp", path)
                helpers = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(helpers)
                return helpers
    from megatron.core.datasets import helpers_cpp
    return helpers_cpp
