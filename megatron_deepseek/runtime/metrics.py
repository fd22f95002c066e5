"""metrics.jsonl: the record of a run, one JSON object a line, which plots, comparisons and tests read.

A training step has the keys of `StepMetrics.record`; a validation has iteration, validation_lm_loss and
validation_mtp_loss, in a blend validation_source_loss too, and no lm_loss. A number that is not finite is written as
null, because JSON has no NaN.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_deepseek.foreign_json import parse_json
from megatron_deepseek.runtime.appending import AppendedFile

FILE_NAME = "metrics.jsonl"
OPTIONAL = ("lm_loss", "mfu", "peak_memory_bytes", "moe_bytes_within_node", "moe_bytes_across_nodes",
            "checkpoint_stall_seconds", "skipped", "source_loss", "source_tokens", "moe_dropped_fraction",
            "moe_crossings_per_token", "tflops_per_rank", "num_zeros", "params_norm")


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The record of one update. `iteration` counts from 1. Losses are in nats a token, `tokens` those of this step.

    mtp_loss has an entry for each depth; balance_loss is None where no such loss is trained on. mfu (0 to 1) and
    peak_memory_bytes, the largest of all ranks, are None on a CPU and then not written. moe_bytes_* are what expert
    dispatch and combination of all ranks sent to other ranks, forwards and backwards, not written without experts on
    several ranks. checkpoint_stall_seconds: how long training stood still for saves between the step before and this
    one, which step_seconds leaves out. `skipped` is true, and else not written, where a loss or gradient was not finite
    and nothing was updated. In a blend, source_loss is the mean of lm_loss over the labels of each dataset that had any
    in this step, and source_tokens the number of those labels; both by the dataset's name. moe_dropped_fraction: the
    part of all token copies that experts had no room for, not written without a capacity. moe_crossings_per_token: to
    how many other nodes a token was sent on its way to the experts of a layer, on average (with alltoall, how many
    copies of it), written where there are several nodes. tflops_per_rank: the model's own floating-point
    operations, 10^12 a second, written with --log-throughput. num_zeros, with --log-num-zeros-in-grad: how many numbers
    of the gradient are 0. params_norm, with --log-params-norm: the Euclidean norm of what is trained, after the update.
    `objective`: what another objective than the next token reports, each under its own name in the record; the first is
    the loss that is trained on. lm_loss is None where a model predicts no tokens.
    """

    iteration: int
    lm_loss: float | None
    mtp_loss: tuple[float, ...]
    balance_loss: float | None
    grad_norm: float
    learning_rate: float
    tokens: int
    step_seconds: float
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    moe_bytes_within_node: int | None = None
    moe_bytes_across_nodes: int | None = None
    checkpoint_stall_seconds: float | None = None
    skipped: bool | None = None
    source_loss: dict[str, float] | None = None
    source_tokens: dict[str, int] | None = None
    moe_dropped_fraction: float | None = None
    moe_crossings_per_token: float | None = None
    tflops_per_rank: float | None = None
    num_zeros: int | None = None
    params_norm: float | None = None
    objective: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> tuple[str, float]:
        """Return the name and the value of the loss that is trained on."""
        return next(iter(self.objective.items()), ("lm_loss", self.lm_loss))

    @property
    def shown_loss(self) -> str:
        """Return the loss that is trained on, as progress shows it: "lm loss 2.3456"."""
        name, value = self.trained
        return f"{name.replace('_', ' ')} {value:.4f}"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    def record(self) -> dict:
        fields = {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}
        more = fields.pop("objective")
        return {name: value for name, value in fields.items() if value is not None or name not in OPTIONAL} | more


class MetricsFile:
    """The file, to which each record is written at once: a killed run loses at most the line that it was writing."""

    def __init__(self, path: Path, resumed_iteration: int, tell: Callable[[str], None]):
        """Continue after `resumed_iteration`, 0 for a new run; later lines are removed: a resume repeats their steps.

        `tell` gets a line when writes fail and when they succeed again: see AppendedFile.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.removed = cut_after(path, resumed_iteration)
        self._file = AppendedFile(path, tell)

    def append(self, record: Mapping) -> None:
        self._file.write((json.dumps(_finite(record), allow_nan=False) + "\n").encode())

    def close(self) -> None:
        """Close the file. Raise OSError if the last records could not be written."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict]:
    """Yield the records of a file, without an unfinished last line. Raise ValueError for a line that is no record."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            record = _parse(line)
            if record is None:
                raise ValueError(f"{path}, line {number} is not a JSON object with an iteration: {line.strip()[:60]!r}")
            yield record


def cut_after(path: Path, iteration: int) -> int:
    """Remove the records after `iteration` and return how many; the file is replaced at once or stays as it was.

    At iteration 0 nothing came before, so a validation of the untrained model goes too: it will be made again. Lines
    that are no records (a crash can leave part of one) are removed as well, and not counted.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    lines = [line.rstrip("\n") + "\n" for line in content.decode(errors="replace").splitlines(keepends=True)]
    records = [(line, record["iteration"]) for line in lines if (record := _parse(line)) is not None]
    lines = [line for line, at in records if 0 < iteration >= at]
    kept = "".join(lines).encode()
    if content.startswith(kept):  # true unless something is damaged; truncating needs no room on a full disk
        os.truncate(path, len(kept))
    else:
        replace_content(path, kept)
    return len(records) - len(lines)


def replace_content(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _parse(line: str) -> dict | None:
    try:
        record = parse_json(line.encode(errors="replace"), "a record")
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("iteration")) is int else None


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
