"""The samples that GRPO keeps, rollouts/step_N.jsonl of --save, as somebody who looks at them needs them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_deepseek.foreign_json import JsonObject, parse_json
from megatron_deepseek.rewards.answer import split_answer

FOLDER = "rollouts"
_NAME = re.compile(r"step_(\d+)\.jsonl")
_NUMBERS = ("reward", "advantage", "log_probability", "rollout_log_probability", "reference_log_probability")


@dataclass(frozen=True)
class Kept:
    """A sample. `rewards`: of each function by name. Log-probabilities are sums over its `tokens`, in nats; what is not
    known is None.
    """

    group: int
    prompt: str
    completion: str
    tokens: int | None = None
    finish_reason: str | None = None
    reward: float | None = None
    advantage: float | None = None
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    log_probability: float | None = None
    rollout_log_probability: float | None = None
    reference_log_probability: float | None = None

    @property
    def parts(self) -> tuple[str | None, str]:
        """Return the reasoning and the answer."""
        return split_answer(self.prompt, self.completion)

    @property
    def drift(self) -> float | None:
        """Return by how much training and rollout differ on this sample: the mean of log(pi_train / pi_rollout)."""
        if not self.tokens or self.log_probability is None or self.rollout_log_probability is None:
            return None
        return (self.log_probability - self.rollout_log_probability) / self.tokens


@dataclass(frozen=True)
class Step:
    """The samples of the rollout that step `number` was the first to train on, in the order of the file."""

    number: int
    samples: tuple[Kept, ...]

    @property
    def groups(self) -> list[list[Kept]]:
        """Return the samples of each prompt."""
        found: dict[int, list[Kept]] = {}
        for each in self.samples:
            found.setdefault(each.group, []).append(each)
        return list(found.values())

    def summary(self) -> dict[str, Any]:
        """Return what is said of a step in a line; means are over the samples that have a value."""
        rewards = [each.reward for each in self.samples]
        even = [group for group in self.groups if len({each.reward for each in group} - {None}) < 2]
        names = dict.fromkeys(name for each in self.samples for name in each.rewards)
        return {"samples": len(self.samples), "groups": len(self.groups), "even_groups": len(even),
                "reward": mean(rewards), "tokens": mean([each.tokens for each in self.samples]),
                "rewards": {name: mean([each.rewards.get(name) for each in self.samples]) for name in names},
                "finish_reasons": dict(Counter(each.finish_reason or "unknown" for each in self.samples)),
                "drift": mean([each.drift for each in self.samples])}


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is not None, None where nothing is left."""
    there = [each for each in values if each is not None]
    return fmean(there) if there else None


def find_steps(path: Path) -> dict[int, Path]:
    """Return the files of a run by their steps: of --save, of its folder of rollouts, or a file alone.

    Raise ValueError where there is none.
    """
    if path.is_file():
        match = _NAME.fullmatch(path.name)
        return {int(match[1]) if match else 0: path}
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    found = {int(match[1]): file for file in folder.glob("step_*.jsonl") if (match := _NAME.fullmatch(file.name))}
    if not found:
        raise ValueError(f"{path} holds no step_N.jsonl: it is neither the --save of a GRPO run nor its {FOLDER}")
    return dict(sorted(found.items()))


def read_step(number: int, path: Path) -> Step:
    """Return the samples of a file. Raise ValueError that names the line which is none."""
    samples = []
    for line, content in enumerate(path.read_bytes().splitlines(), start=1):
        if content.strip():
            where = f"{path}, line {line}"
            samples.append(_kept(JsonObject.of(parse_json(content, where), where), line))
    return Step(number, tuple(samples))


def _kept(record: JsonObject, line: int) -> Kept:
    rewards = record.object("rewards", default=None)
    values = {} if rewards is None else {name: rewards.number(name, default=None) for name in rewards.fields}
    numbers = {name: record.number(name, default=None) for name in _NUMBERS}
    return Kept(record.integer("group", default=line), record.text("prompt"), record.text("completion"),
                record.integer("tokens", default=None), record.text("finish_reason", None), rewards=values, **numbers)
