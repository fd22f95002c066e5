"""The curves of reinforcement learning, for tools/plot_metrics.py --of rewards.

From the top: the mean reward of each rollout, with that of held-out prompts as points; the tokens of a completion, the
mean strong and the longest light; and the entropy of the predictions in nats. Several runs are drawn over each other.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_deepseek.runtime.metrics import read_metrics

# Okabe and Ito's colours, which readers with colour blindness can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STEPS = ("iteration", "reward", "mean_completion", "longest_completion", "entropy")
_HELD_OUT = ("iteration", "eval_reward")


@dataclass(frozen=True)
class RewardCurves:
    """The metrics of a run as arrays by name: `steps` of updates that began a rollout, `held_out` of evaluations."""

    label: str
    steps: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]


def read_reward_curves(path: Path, label: str) -> RewardCurves:
    """Read a metrics.jsonl; raise ValueError if it has no rollout, or a value that is no number."""
    records = list(read_metrics(path))
    steps = [record for record in records if "mean_completion" in record]
    if not steps:
        raise ValueError(f"{path} holds no rollout: train_grpo.py writes them")
    try:
        return RewardCurves(label, _columns(steps, _STEPS),
                            _columns([record for record in records if "eval_reward" in record], _HELD_OUT))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a value that is no number: {error}") from error


def _columns(records: list[dict], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {name: np.array([record.get(name) for record in records], dtype=float) for name in names}


def draw_rewards(runs: list[RewardCurves], output: Path) -> None:
    """Draw the runs over each other to the PNG `output`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(3, 1, sharex=True, figsize=(9, 7.5), height_ratios=(3, 2, 1), layout="constrained")
    for number, run in enumerate(runs):
        _draw(panels, run, COLORS[number % len(COLORS)], f"{run.label}: " if len(runs) > 1 else "")
    panels[0].set_title(runs[0].label if len(runs) == 1 else "Rewards of " + ", ".join(run.label for run in runs))
    for axes, name in zip(panels, ("reward", "tokens of a\ncompletion", "entropy\n(nats)")):
        axes.set_ylabel(name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:2]:
        axes.legend(frameon=False, fontsize="small")
    panels[1].set_ylim(bottom=0)
    panels[2].set_xlabel("iteration (optimizer steps)")
    panels[2].xaxis.set_major_locator(ticker.MaxNLocator(nbins=10, steps=(1, 2, 5, 10), integer=True))
    figure.align_ylabels()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def _draw(panels, run: RewardCurves, color: str, prefix: str) -> None:
    rewards, lengths, entropies = panels
    steps, held_out = run.steps, run.held_out
    rewards.plot(steps["iteration"], steps["reward"], color=color, linewidth=1.5, label=f"{prefix}rollouts")
    if len(held_out["iteration"]):
        rewards.plot(held_out["iteration"], held_out["eval_reward"], "o", color=color, markersize=6,
                     markeredgecolor="white", label=f"{prefix}held-out prompts, likeliest answers")
    lengths.plot(steps["iteration"], steps["mean_completion"], color=color, linewidth=1.5, label=f"{prefix}mean")
    lengths.plot(steps["iteration"], steps["longest_completion"], color=color, alpha=0.35, linewidth=1.0,
                 label=f"{prefix}longest")
    entropies.plot(steps["iteration"], steps["entropy"], color=color, linewidth=1.5)
