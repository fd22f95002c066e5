"""What a run did: for the screen and, in full, as JSON."""

from dataclasses import dataclass

from megatron_deepseek.data.corpus.part import Summary
from megatron_deepseek.data.corpus.plan import Part
from megatron_deepseek.data.corpus.records import where
from megatron_deepseek.data.index_file import open_index
from megatron_deepseek.data.inspection import Statistics, measure

ERRORS_ON_SCREEN = 10
DATASETS_ON_SCREEN = 1


@dataclass(frozen=True)
class Report:
    """`datasets` by JSON key, several in a blend; `skipped` and `notes` count documents by reason, with each of
    `errors` as "file line n: why"."""

    datasets: dict[str, list[Statistics]]
    documents: int
    tokens: int
    input_bytes: int
    chars: int
    skipped: dict[str, int]
    notes: dict[str, int]
    errors: list[str]
    tokenizer_backend: str
    parts: int
    parts_reused: int
    seconds: float

    def lines(self) -> list[str]:
        from megatron_deepseek.data.dataset_command import describe  # its tqdm costs 30 ms, and is not always wanted
        made = [f"{self.documents} documents, {self.tokens} tokens in {self.seconds:.1f} s "
                f"({self.tokens / self.seconds / 1e6:.2f} M tokens/s, {self.input_bytes / self.seconds / 1e6:.1f} MB/s "
                f"of input; tokenizer: {self.tokenizer_backend})"]
        if self.parts_reused:
            made.append(f"{self.parts_reused} of {self.parts} parts were there from before")
        made += [f"skipped {count}: {reason}" for reason, count in sorted(self.skipped.items())]
        made += [f"noted {count}: {what}" for what, count in sorted(self.notes.items())]
        made += [f"  {error}" for error in self.errors[:ERRORS_ON_SCREEN]]
        if len(self.errors) > ERRORS_ON_SCREEN:
            made.append(f"  ... and {len(self.errors) - ERRORS_ON_SCREEN} more in the report")
        return made + [describe(each) for own in self.datasets.values() for each in own[:DATASETS_ON_SCREEN]]


def measure_all(prefixes: dict[str, list[str]]) -> dict[str, list[Statistics]]:
    return {key: [measure(open_index(prefix, "dataset")) for prefix in own] for key, own in prefixes.items()}


def describe_errors(parts: list[Part], summaries: list[Summary]) -> list[str]:
    """Each error by file and line. Where a part begins inside a file, the lines of the parts before it are known."""
    described, counted = [], {}
    for part, summary in zip(parts, summaries, strict=True):
        before = []
        for segment, lines in zip(part.segments, summary.lines):
            path = segment.source.index
            before.append(counted.get(path, 0) if segment.lines_before is None else segment.lines_before)
            counted[path] = before[-1] + lines
        described += [f"{where(part.segments[segment], line, before[segment])}: {detail}"
                      for segment, line, _, detail in summary.errors]
    return described
