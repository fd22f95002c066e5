"""The plan of pre-training data: which indices the splits need, which of them a folder lacks, and building these."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_deepseek.data.blend_index import BlendIndex
from megatron_deepseek.data.cache import SEAL_BYTES, Stamp, sound_files, stamp_of
from megatron_deepseek.data.sample_index import PackedSplit, build_all

_MUCH_TO_READ = 1 << 30  # bytes; reading more is worth a line on the screen


@dataclass(frozen=True)
class SplitPlan:
    """The `sources` of one split, one for each dataset of its blend, with weights that add up to 1.

    `left_out` are prefixes whose share is less than a sample, of a split that is not trained on. Of a split that is
    `apart` each dataset is read by itself, from its first sample on.
    """

    sources: tuple[PackedSplit, ...]
    weights: tuple[float, ...]
    num_samples: int
    left_out: tuple[str, ...] = ()
    apart: bool = False

    @property
    def index(self) -> BlendIndex | None:
        """Return the index of the blend, None for a single dataset: its samples come in its own order."""
        return BlendIndex(self.weights, self.num_samples) if len(self.sources) > 1 and not self.apart else None


@dataclass(frozen=True)
class Missing:
    """The indices that a folder lacks or holds damaged: of samples, each once, and of blends."""

    samples: tuple[PackedSplit, ...]
    blends: tuple[BlendIndex, ...]


@dataclass(frozen=True)
class DataPlan:
    """The plans of (train, valid, test), None where no samples are needed, and the folder of the indices.

    `stamps` are those of the files that have been found sound, by name.
    """

    splits: tuple[SplitPlan | None, ...]
    folder: Path
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    def missing(self, look_inside: bool = True, say=lambda line: None) -> Missing:
        """Return the indices that are to be built.

        Files with the known stamps are sound. Of the others every byte is read if `look_inside`, else only the size
        is compared.
        """
        samples = {source.file_name: source for split in self._needed() for source in split.sources}
        found = {split.index: split.index.find(self.folder) for split in self._needed() if split.index is not None}
        sizes = {name: source.file_size for name, source in samples.items()}
        sizes |= {there[0].name: 10 * there[1] for there in found.values() if there is not None}
        sound = self._sound(sizes, look_inside, say)
        return Missing(tuple(source for name, source in samples.items() if name not in sound),
                       tuple(index for index, there in found.items() if there is None or there[0].name not in sound))

    def _sound(self, sizes: dict[str, int], look_inside: bool, say) -> set[str]:
        stamps = {name: stamp_of(self.folder / name) for name in sizes}
        there = {name for name, stamp in stamps.items() if stamp is not None and stamp.size == sizes[name] + SEAL_BYTES}
        unknown = {name: sizes[name] for name in there if self.stamps.get(name) != stamps[name]}
        if not look_inside or not unknown:
            return there
        if sum(unknown.values()) > _MUCH_TO_READ:
            say(f"checking {sum(unknown.values()) / 1e9:,.1f} GB of indices in {self.folder}")
        wrong = set(unknown) - sound_files(self.folder, unknown)
        if wrong:
            say(f"{len(wrong)} indices in {self.folder} are damaged, such as {min(wrong)}: they are made anew")
        return there - wrong

    def build(self, missing: Missing, workers: int | None = None, built=lambda split: None) -> "DataPlan":
        """Build what is missing and return the plan with the stamps of all files; `built` gets each sample index."""
        build_all(list(missing.samples), self.folder, workers, built)
        made = set()
        for index in sorted(missing.blends, key=lambda index: -index.size):  # a longer one serves the next, too
            if index.find(self.folder) not in made:
                index.build(self.folder)
                made.add(index.find(self.folder))
        names = [source.file_name for split in self._needed() for source in split.sources]
        names += [split.index.find(self.folder)[0].name for split in self._needed() if split.index is not None]
        return dataclasses.replace(self, stamps={name: stamp_of(self.folder / name) for name in names})

    def _needed(self) -> list[SplitPlan]:
        return [split for split in self.splits if split is not None]
