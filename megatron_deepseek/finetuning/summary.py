"""What became of rows, of a part and of a whole dataset."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field

MOST_MESSAGES = 5


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a dataset.

    `rows` were read, `samples` are left; `dropped` counts the others by reason (over-long ones, bad ones, those without
    loss); `bad` are the first messages of the `bad_rows` bad rows, each with file and line. `tokens` and `trained` are
    sums over the samples, `trained` of labels with a loss weight. `left_out` counts what the template does not show.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad: tuple[str, ...] = ()
    bad_rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, written: dict) -> "Counts":
        """Return the counts that `asdict` wrote to JSON."""
        return cls(**{**written, "bad": tuple(written["bad"])})

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.rows + other.rows, self.samples + other.samples, self.tokens + other.tokens,
                      self.trained + other.trained, dict(Counter(self.dropped) + Counter(other.dropped)),
                      (self.bad + other.bad)[:MOST_MESSAGES], self.bad_rows + other.bad_rows,
                      dict(Counter(self.left_out) + Counter(other.left_out)))


@dataclass(frozen=True)
class Summary:
    """A finished part: its number, counts, and the sizes of its files by their endings."""

    part: int
    counts: Counts
    sizes: dict[str, int]


def read_summary(path: str) -> Summary | None:
    """Return the summary in a file, None where it or a file of the part is missing or not whole."""
    try:
        with open(path, encoding="utf-8") as file:
            written = json.load(file)
        summary = Summary(written["part"], Counts.of(written["counts"]), written["sizes"])
        base = path.removesuffix(".json")
        whole = all(os.path.getsize(base + suffix) == size for suffix, size in summary.sizes.items())
        return summary if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
