"""A file of numbers, one for each sample, that is filled bit by bit and may be deleted at any time.

NaN stands for what is missing. A number is written in one piece, so a killed job leaves a file that the next one goes
on with: reference.py scores the samples that are still missing.
"""

import os
from pathlib import Path

import numpy as np


class SumsFile:
    """A .npy file of float64 [N], written by one process. A file that is damaged, or of another length, is begun anew.
    """

    def __init__(self, path: Path, num_samples: int):
        self.path = path
        found = self._open(num_samples)
        if found is None:
            aside = path.with_name(path.name + ".tmp")
            with open(aside, "wb") as file:
                np.save(file, np.full(num_samples, np.nan))
            os.replace(aside, path)
            found = self._open(num_samples)
        self.numbers = found

    def _open(self, num_samples: int) -> np.memmap | None:
        try:
            size = self.path.stat().st_size
            found = np.lib.format.open_memmap(self.path, "r+")
        except (OSError, ValueError):
            return None
        whole = size == found.offset + found.nbytes  # numpy fills up a file that is too short with zeros
        return found if whole and found.dtype == np.float64 and found.shape == (num_samples,) else None

    @property
    def missing(self) -> np.ndarray:
        """Return which samples have no number yet, bool [N]."""
        return np.isnan(self.numbers)

    def flush(self) -> None:
        self.numbers.flush()
