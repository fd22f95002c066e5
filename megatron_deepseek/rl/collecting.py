"""Collects the samples of a rollout: prompts are asked and answers judged, until there are groups to learn from."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch.distributed as dist

from megatron_deepseek.rl.advantages import group_advantages
from megatron_deepseek.rl.judging import Verdict
from megatron_deepseek.rl.prompts import Prompt, PromptOrder, Prompts
from megatron_deepseek.rl.rollout.engine import seed_of
from megatron_deepseek.rl.samples import Sample
from megatron_deepseek.rl_settings import PolicyLossSettings, RolloutSettings


class Engine(Protocol):
    """What answers: rl/rollout/engine.py."""

    def generate(self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], rollout: RolloutSettings,
                 temperature: float) -> list[list[Sample]]: ...


JudgeOfSamples = Callable[[Sequence[Prompt], Sequence[Sample]], Verdict]  # judging.py's Judge


class PromptSource:
    """The prompts of the run on all ranks: rank 0 holds them, and tells the others those that are asked for."""

    def __init__(self, prompts: Prompts | None, seed: int):
        self.prompts, told = prompts, [len(prompts.prompts) if prompts is not None else None]
        dist.broadcast_object_list(told)
        self.order = PromptOrder(told[0], seed)

    def take(self, begin: int, number: int) -> list[Prompt]:
        """Return `number` prompts of the endless sequence from `begin` on; all ranks call it."""
        told: list = [None]
        if self.prompts is not None:
            told = [[self.prompts.prompts[place] for place in self.order.places(begin, number)]]
        dist.broadcast_object_list(told)
        return told[0]


@dataclass(frozen=True, eq=False)
class Collected:
    """The samples of a rollout, group after group, with their rewards; `prompts` has one for each sample.

    `used`: prompts that were asked, in `rounds` rounds. `even_groups`: groups whose answers all had one reward, and
    `unrewarded_groups`: those without any reward, among all that were asked; the latter are not among the samples, nor
    are the former with dynamic sampling. `tokens`: of all completions. `rollout_seconds`, `reward_seconds`: spent.
    """

    samples: tuple[Sample, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    verdict: Verdict = Verdict((), {})
    used: int = 0
    rounds: int = 0
    even_groups: int = 0
    unrewarded_groups: int = 0
    tokens: int = 0
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0

    @property
    def num_groups(self) -> int:
        return len({sample.group for sample in self.samples})

    def __add__(self, other: "Collected") -> "Collected":
        return Collected(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


class Collector:
    """Makes rollouts. All ranks have one and call it in the same order.

    `rounds`: of dynamic sampling at most, None without it. `seed`: the run's.
    """

    def __init__(self, source: PromptSource, engine: Engine, judge: JudgeOfSamples, rollout: RolloutSettings,
                 loss: PolicyLossSettings, rounds: int | None, seed: int):
        self.source, self.engine, self.judge = source, engine, judge
        self.rollout, self.loss, self.rounds, self.seed = rollout, loss, rounds, seed

    def collect(self, number: int, begin: int) -> Collected:
        """Return rollout `number`, which asks the prompts of the sequence from `begin` on.

        With dynamic sampling (arXiv 2503.14476, eq. 11) a round asks as many as groups are still missing.
        """
        found = Collected()
        while found.num_groups < self.rollout.prompts and found.rounds < (self.rounds or 1):
            found += self._round(number, begin, found.used, self.rollout.prompts - found.num_groups)
        return found

    def _round(self, number: int, begin: int, asked: int, groups: int) -> Collected:
        """Ask `groups` prompts, before which `asked` were asked in this rollout."""
        started = time.perf_counter()
        asking = self.source.take(begin + asked, groups)
        seeds = [seed_of(self.seed, number, asked + place) for place in range(groups)]
        answers = self.engine.generate([prompt.ids for prompt in asking], seeds, self.rollout, self.loss.temperature)
        samples = [replace(sample, group=asked + place) for place, group in enumerate(answers) for sample in group]
        prompts = [asking[sample.group - asked] for sample in samples]
        answered = time.perf_counter()
        verdict = self.judge(prompts, samples)
        judged = time.perf_counter()
        even, unrewarded = self._useless(samples, verdict)
        left_out = unrewarded if self.rounds is None else unrewarded | even
        kept = [place for place, sample in enumerate(samples) if sample.group not in left_out]
        return Collected(tuple(samples[each] for each in kept), tuple(prompts[each] for each in kept), verdict.of(kept),
                         groups, 1, len(even), len(unrewarded), sum(len(sample.tokens) for sample in samples),
                         answered - started, judged - answered)

    def _useless(self, samples: Sequence[Sample], verdict: Verdict) -> tuple[set[int], set[int]]:
        """Return the groups with one reward, and those with none."""
        groups = [sample.group for sample in samples]
        rewarded = {group for group, total in zip(groups, verdict.total) if total is not None}
        return {*group_advantages(verdict.total, groups, self.loss).even_groups} & rewarded, {*groups} - rewarded
