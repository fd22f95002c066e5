"""--eval-prompts: the likeliest answers to held-out prompts by the model of the moment, and their rewards."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from megatron_deepseek.rl.collecting import JudgeOfSamples
from megatron_deepseek.rl.prompts import Prompt
from megatron_deepseek.rl.rollout.engine import RolloutEngine
from megatron_deepseek.rl_settings import RolloutSettings
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.training.trainer import Trainer

_LIKELIEST = 0.0  # the temperature at which nothing is drawn


class HeldOut:
    """Answers the same prompts whenever it is called. All ranks call it, with the same prompts."""

    def __init__(self, name: str, prompts: Sequence[Prompt], engine: RolloutEngine, judge: JudgeOfSamples,
                 rollout: RolloutSettings):
        self.name, self.prompts, self.engine, self.judge = name, prompts, engine, judge
        self.rollout = replace(rollout, group_size=1, top_p=1.0, top_k=0, min_p=0.0, keep_routing=False,
                               keep_sampling_mask=False)

    def __call__(self, trainer: Trainer, report: Report, iteration: int) -> None:
        self.engine.refresh()
        groups = self.engine.generate([prompt.ids for prompt in self.prompts], [0] * len(self.prompts), self.rollout,
                                      _LIKELIEST)
        self.engine.release()
        samples = [sample for group in groups for sample in group]
        verdict = self.judge(self.prompts, samples)
        rewards = {f"reward_{name}": _mean(values) for name, values in verdict.values.items()}
        report.held_out(iteration, self.name, {
            "reward": _mean(verdict.total), **rewards, "answers": len(samples),
            "mean_completion": fmean(len(sample.tokens) for sample in samples),
            "cut_completions": fmean(not sample.finished for sample in samples)})


def _mean(values: Sequence[float | None]) -> float:
    """Return the mean of the values that are there, NaN where none is."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else float("nan")
