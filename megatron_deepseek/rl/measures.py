"""What metrics.jsonl says of a rollout, in the record of the first update with it; docs/grpo.md explains the names."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev

from megatron_deepseek.rl.collecting import Collected
from megatron_deepseek.rl.judging import Verdict
from megatron_deepseek.rl.samples import Sample


def rollout_reports(collected: Collected, advantages: Sequence[float]) -> dict[str, float]:
    """Return the numbers of a rollout by name."""
    lengths = [len(sample.tokens) for sample in collected.samples] or [0]
    cut = [not sample.finished for sample in collected.samples]
    return {**_rewards(collected.samples, collected.verdict), "advantage_spread": pstdev(advantages or [0.0]),
            "zero_variance_groups": collected.even_groups, "unrewarded_groups": collected.unrewarded_groups,
            "sampling_rounds": collected.rounds, "prompts": collected.used, "samples": len(collected.samples),
            "mean_completion": fmean(lengths), "longest_completion": max(lengths),
            "cut_completions": fmean(cut or [0.0]), "rollout_seconds": collected.rollout_seconds,
            "reward_seconds": collected.reward_seconds,
            "rollout_tokens_per_second": collected.tokens / max(collected.rollout_seconds, 1e-9)}


def _rewards(samples: Sequence[Sample], verdict: Verdict) -> dict[str, float]:
    """Return the mean reward, its spread within groups, the mean of each function, and how often each failed."""
    by_group = defaultdict(list)
    for sample, total in zip(samples, verdict.total):
        if total is not None:
            by_group[sample.group].append(total)
    spreads = [pstdev(totals) for totals in by_group.values()]
    found = {"reward": _mean(verdict.total), "reward_spread": fmean(spreads or [0.0])}
    found |= {f"reward_{name}": _mean(values) for name, values in verdict.values.items()}
    return found | {f"reward_failures_{name}_{kind.replace(' ', '_')}": count
                    for name, kinds in verdict.failures.items() for kind, count in kinds.items()}


def _mean(values: Iterable[float | None]) -> float:
    """Return the mean of the values that are there, NaN where none is, which metrics.jsonl has as null."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else float("nan")
