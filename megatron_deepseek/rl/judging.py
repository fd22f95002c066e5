"""Rewards of samples: functions in processes of rank 0, whose verdict all ranks get; the penalty of long answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_deepseek.checkpoint.job.distributed import together
from megatron_deepseek.rewards.result import RewardResult
from megatron_deepseek.rewards.spec import parse_rewards
from megatron_deepseek.rewards.texts import TOKENS_COLUMN
from megatron_deepseek.rewards.workers import RewardWorkers
from megatron_deepseek.rl.prompts import Prompt
from megatron_deepseek.rl.samples import Sample
from megatron_deepseek.rl_settings import ReinforcementSettings

OVERLONG = "overlong"  # the name of the penalty among the rewards


@dataclass(frozen=True)
class Verdict:
    """The rewards of samples, in their order, the same on every rank.

    `total`: None for a sample that no function gave a reward. `values`: of each function by its name, and of the
    penalty of long answers. `failures`: how many samples a function failed on, by its name and the kind of failure.
    """

    total: tuple[float | None, ...]
    values: Mapping[str, tuple[float | None, ...]]
    failures: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __add__(self, other: "Verdict") -> "Verdict":
        """Return the verdict on the samples of both, in turn."""
        failures = {name: dict(kinds) for name, kinds in self.failures.items()}
        for name, kinds in other.failures.items():
            own = failures.setdefault(name, {})
            for kind, count in kinds.items():
                own[kind] = own.get(kind, 0) + count
        values = {name: (*self.values.get(name, ()), *each) for name, each in other.values.items()}
        return Verdict((*self.total, *other.total), values, failures)

    def of(self, places: Sequence[int]) -> "Verdict":
        """Return the verdict on some of the samples, with the failures on all."""
        return Verdict(tuple(self.total[each] for each in places),
                       {name: tuple(values[each] for each in places) for name, values in self.values.items()},
                       self.failures)


class Judge:
    """Rewards samples. All ranks make one and call it in the same order; the processes are rank 0's.

    `tell` gets a line for each kind of failure of a call. Raise ValueError, on all ranks, for a function that cannot be
    loaded.
    """

    def __init__(self, settings: ReinforcementSettings, longest: int, tell: Callable[[str], None]):
        self.settings, self.longest, self.tell = settings, longest, tell
        self.workers = together(self._start)

    def _start(self) -> RewardWorkers | None:
        if dist.get_rank() != 0:
            return None
        specs = parse_rewards(self.settings.reward)
        return RewardWorkers(specs, self.settings.reward_timeout, self.settings.reward_workers).__enter__()

    def __call__(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Verdict:
        """Return the rewards of `samples`, each the answer to the prompt at its place. Only rank 0's prompts count."""
        told: list = [None]
        if self.workers is not None:
            result = self.workers.score([prompt.text for prompt in prompts], [sample.text for sample in samples],
                                        [_row(*each) for each in zip(prompts, samples)])
            for note in result.notes:
                self.tell(note)
            told = [self._verdict(result, samples)]
        dist.broadcast_object_list(told)
        return told[0]

    def _verdict(self, result: RewardResult, samples: Sequence[Sample]) -> Verdict:
        values = {name: tuple(each) for name, each in result.values.items()}
        total, buffer = tuple(result.total), self.settings.overlong_buffer
        if buffer is not None:
            penalties = tuple(overlong_penalty(len(sample.tokens), self.longest, buffer) for sample in samples)
            values[OVERLONG] = penalties
            total = tuple(None if own is None else own + penalty for own, penalty in zip(total, penalties))
        return Verdict(total, values, result.failures)

    def close(self) -> None:
        """End the processes."""
        if self.workers is not None:
            self.workers.close()


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """Return DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to `longest` - `buffer` tokens, and from
    there down to -1 at `longest`, where completions are cut.
    """
    return min(0.0, (longest - buffer - length) / buffer)


def _row(prompt: Prompt, sample: Sample) -> dict[str, Any]:
    """Return a row as rewards get it: that of the file, with the number of tokens of the completion."""
    return {**prompt.row, TOKENS_COLUMN: len(sample.tokens)}
