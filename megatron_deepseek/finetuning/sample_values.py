"""The values beside an indexed dataset: a number for each sample, a label or a margin, float32 in a .npy file."""

import os
from collections.abc import Iterable

import numpy as np

VALUES = ".values.npy"  # the ending of the file


def write_values(path: str | os.PathLike, parts: Iterable[np.ndarray]) -> None:
    """Write the values of all samples in order, whole or not at all."""
    aside = f"{os.fspath(path)}.tmp"
    with open(aside, "wb") as file:
        np.save(file, np.concatenate([np.empty(0, np.float32), *parts]).astype(np.float32))
    os.replace(aside, path)


def read_values(path: str | os.PathLike, num_samples: int) -> np.ndarray:
    """Return the values, float32 [num_samples]. Raise ValueError for a damaged file."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove its folder, and it is made again") from error
    if values.shape != (num_samples,):
        raise ValueError(f"{path} has {values.shape} values for {num_samples} samples; remove its folder, and it is "
                         "made again")
    return values
