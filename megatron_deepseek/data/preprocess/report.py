"""The report of a run: in short for the screen and, in full, as JSON."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_deepseek.data.index_file import open_index
from megatron_deepseek.data.inspection import Statistics, describe, measure
from megatron_deepseek.data.preprocess.part import Summary
from megatron_deepseek.data.preprocess.plan import Part
from megatron_deepseek.data.preprocess.records import where

ERRORS_ON_SCREEN = 10
DATASETS_ON_SCREEN = 1


@dataclass(frozen=True)
class Report:
    """The counts, faults and datasets of a finished run.

    `datasets` are by JSON key, several for each in a blend. `skipped` and `notes` count documents by reason; `errors`
    has a line "file line n: why" for each document that cannot be used, `damaged` a sentence for each file that could
    not be read to its end. `made_from` is the digest of the input and the settings; see finished.py.
    """

    datasets: dict[str, list[Statistics]]
    documents: int
    tokens: int
    input_bytes: int
    chars: int
    skipped: dict[str, int]
    notes: dict[str, int]
    errors: list[str]
    damaged: list[str]
    made_from: str
    tokenizer_backend: str
    parts: int
    parts_reused: int
    seconds: float

    def lines(self) -> list[str]:
        made = [f"{self.documents} documents, {self.tokens} tokens in {self.seconds:.1f} s "
                f"({self.tokens / self.seconds / 1e6:.2f} M tokens/s, {self.input_bytes / self.seconds / 1e6:.1f} MB/s "
                f"of input; tokenizer: {self.tokenizer_backend})"]
        if self.parts_reused:
            made.append(f"{self.parts_reused} of {self.parts} parts were there from before")
        made += [f"damaged: {each}" for each in _head(self.damaged)]
        made += [f"skipped {count}: {reason}" for reason, count in sorted(self.skipped.items())]
        made += [f"noted {count}: {what}" for what, count in sorted(self.notes.items())]
        made += [f"  {error}" for error in _head(self.errors)]
        return made + [describe(each) for own in self.datasets.values() for each in own[:DATASETS_ON_SCREEN]]


def measure_all(prefixes: dict[str, list[str]]) -> dict[str, list[Statistics]]:
    return {key: [measure(open_index(prefix, "dataset")) for prefix in own] for key, own in prefixes.items()}


def _head(lines: list[str]) -> list[str]:
    more = len(lines) - ERRORS_ON_SCREEN
    return lines[:ERRORS_ON_SCREEN] + [f"... and {more} more in the report"] * (more > 0)


def describe_errors(parts: list[Part], summaries: list[Summary]) -> list[str]:
    """Return a line for each error, with its file and line."""
    return [f"{where(part.segments[segment], line, before[segment])}: {detail}"
            for part, summary, before in _with_lines_before(parts, summaries)
            for segment, line, _, detail in summary.errors]


def describe_damage(parts: list[Part], summaries: list[Summary]) -> list[str]:
    """Return a line for each file that could not be read to its end: where that began, and what was taken of it."""
    found, taken = {}, {}
    for part, summary, before in _with_lines_before(parts, summaries):
        for segment, documents in zip(part.segments, summary.taken, strict=True):
            taken[segment.input_file.index] = taken.get(segment.input_file.index, 0) + documents
        for segment, line, detail in summary.damage:
            place = where(part.segments[segment], line, before[segment])
            found.setdefault(part.segments[segment].input_file.index, f"{place}: {detail}")
    return [f"{detail}; {taken[file_number]} of its documents were taken" for file_number, detail in found.items()]


def _with_lines_before(parts: list[Part], summaries: list[Summary]) -> Iterator[tuple[Part, Summary, list[int | None]]]:
    """Yield each part with the lines before each segment in its file, None where an earlier part is not given."""
    counted: dict[int, tuple[int | None, int | None]] = {}
    for part, summary in zip(parts, summaries, strict=True):
        before = []
        for segment, lines in zip(part.segments, summary.lines, strict=True):
            end, known = counted.get(segment.input_file.index, (0, 0))
            before.append(segment.lines_before if segment.lines_before is not None else
                          known if end == segment.start else None)
            counted[segment.input_file.index] = segment.end, None if before[-1] is None else before[-1] + lines
        yield part, summary, before
