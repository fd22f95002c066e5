"""The datasets of train, valid and test and their proportions, as `--data-path`, `--split` and others name them."""

import itertools
import math
import os
from dataclasses import dataclass

from megatron_deepseek.settings import DataSettings

SPLITS = ("train", "valid", "test")
MOST_DATASETS = 32767  # int16 in the index of a blend


@dataclass(frozen=True)
class Blend:
    """The prefixes of datasets and their weights. Without weights each counts by the number of its tokens."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class SplitBlend:
    """One split of a blend: of every dataset the sequences between the two fractions of `share`.

    `argument` and `share_argument` are the options that said so, for messages.
    """

    name: str
    blend: Blend
    share: tuple[float, float]
    argument: str
    share_argument: str

    def bounds(self, num_sequences: int) -> tuple[int, int]:
        """Return the first sequence of a dataset and the end (exclusive), rounded as megatron-core does."""
        first, end = self.share
        return round(first * num_sequences), round(end * num_sequences)


def split_blends(settings: DataSettings) -> tuple[SplitBlend | None, ...]:
    """Return the blends of (train, valid, test). Raise ValueError for an argument that cannot be understood."""
    own = settings.split_data_paths is not None
    options = settings.data_arguments or tuple(f"--{name}-data-path" if own else "--data-path" for name in SPLITS)
    if own:
        return tuple(None if path is None else
                     SplitBlend(name, parse_blend(path, option), (0.0, 1.0), option, option)
                     for name, path, option in zip(SPLITS, settings.split_data_paths, options, strict=True))
    blend = parse_blend(settings.data_path, options[0])
    ends = itertools.accumulate(parse_split(settings.split), initial=0.0)
    return tuple(SplitBlend(name, blend, share, options[0], f"--split {settings.split}")
                 for name, share in zip(SPLITS, itertools.pairwise(ends), strict=True))


def parse_blend(data_path, argument: str = "--data-path") -> Blend:
    """Return the blend of a list of prefixes, or of weights and prefixes in turn, as one number among them tells."""
    shown = " ".join(data_path if len(data_path) <= 8 else [*data_path[:8], "..."])

    def refuse(why: str):
        return ValueError(f"{argument} {shown}: {why}")

    if not data_path:
        raise ValueError(f"{argument} is missing: it takes the prefix of a dataset, or weights and prefixes")
    if not any(_is_number(entry) and not os.path.isfile(entry + ".idx") for entry in data_path):
        blend = Blend(tuple(data_path), None)
    else:
        if len(data_path) % 2:
            raise refuse(f"weights and prefixes must take turns, but there are {len(data_path)} entries, an odd number")
        for entry in data_path[::2]:
            if not _is_number(entry):
                raise refuse(f"weights and prefixes must take turns, but {entry!r} is no number")
            if not 0 < float(entry) < math.inf:
                raise refuse(f"the weight {entry} is not greater than 0 and finite")
        blend = Blend(tuple(data_path[1::2]), tuple(map(float, data_path[::2])))
    if len(blend.prefixes) > MOST_DATASETS:
        raise refuse(f"{len(blend.prefixes)} datasets, more than {MOST_DATASETS}")
    return blend


def parse_split(split: str) -> tuple[float, ...]:
    """Return `--split`'s up to three weights, for train, valid and test, as shares that add up to 1."""
    entries = split.split(",")
    if len(entries) > 3 or not all(map(_is_number, entries)):
        raise ValueError(f"--split {split}: it takes up to three numbers, for train, valid and test: 969,30,1")
    weights = [*map(float, entries), 0.0, 0.0][:3]
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(f"--split {split}: the weights must not be negative, and their sum must be greater than 0")
    return tuple(weight / sum(weights) for weight in weights)


def short_names(prefixes) -> tuple[str, ...]:
    """Return each prefix without the folders that all of them begin with; a prefix that comes again gets a number."""
    common = os.path.commonprefix([os.path.dirname(prefix) + "/" for prefix in prefixes])
    begin = common.rfind("/") + 1 if all(map(os.path.dirname, prefixes)) else 0
    names, seen = [], {}
    for prefix in prefixes:
        name = prefix[begin:]
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(names)


def _is_number(entry: str) -> bool:
    try:
        return not math.isnan(float(entry))
    except ValueError:
        return False
