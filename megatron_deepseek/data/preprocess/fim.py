"""Fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255) as DeepSeek-V3 was trained (arXiv 2412.19437, 4.1):

    PSM  <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle
    SPM  <｜fim▁begin｜> <｜fim▁hole｜> suffix <｜fim▁end｜> prefix middle     (as in Megatron-LM's GPTFIMDataset)

The three pieces are cut between characters, before tokenisation, and encoded each by itself.
"""

import struct
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

DRAWS = 1 << 64


@dataclass(frozen=True)
class Rearrangement:
    """How one document is rearranged: SPM or PSM; `first` and `second` are draws in [0, 2^64) for the two places."""

    spm: bool
    first: int
    second: int

    def cut(self, text: str) -> list[str]:
        """Return prefix, middle and suffix, each possibly empty."""
        low, high = sorted((self.first % (len(text) + 1), self.second % (len(text) + 1)))
        return [text[:low], text[low:high], text[high:]]

    def join(self, pieces: list[np.ndarray], fim: tuple[int, int, int]) -> np.ndarray:
        prefix, middle, suffix = pieces
        begin, hole, end = (np.array([token], np.int64) for token in fim)
        if self.spm:
            return np.concatenate([begin, hole, suffix, end, prefix, middle])
        return np.concatenate([begin, prefix, hole, suffix, end, middle])


def draw_rearrangement(seed: int, rate: float, spm_rate: float, file_number: int, place: int) -> Rearrangement | None:
    """Return the rearrangement of the document that begins at `place` of an input file, None for 1 - `rate` of all.

    It depends on the arguments alone, not on which process or part the document is in.
    """
    digest = blake2b(struct.pack("<qqq", seed, file_number, place), digest_size=32, person=b"fim").digest()
    chosen, spm, first, second = struct.unpack("<4Q", digest)
    return Rearrangement(spm < spm_rate * DRAWS, first, second) if chosen < rate * DRAWS else None
