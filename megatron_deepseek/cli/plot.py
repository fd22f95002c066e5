"""The command line of tools/plot_metrics.py, which draws the curves of metrics.jsonl files.

The upper panel has the losses: each step light, their running mean strong, MTP dashed, validation as points. Two small
panels below have the learning rate and the gradient norm. Several files are drawn over each other to compare runs.
With --of experts it draws how evenly the runs use their experts, from their expert_load.jsonl, with --of rewards what
plot_rewards.py says.
"""

import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from megatron_deepseek.arguments import values
from megatron_deepseek.cli.plot_rewards import COLORS, draw_rewards, read_reward_curves
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.packages import how_to_install
from megatron_deepseek.runtime.expert_load import FILE as EXPERT_LOAD
from megatron_deepseek.runtime.expert_load import read_history
from megatron_deepseek.runtime.expert_picture import draw_load
from megatron_deepseek.runtime.metrics import read_metrics

PROGRAM = "plot_metrics.py"
MARKERS = "oDv^P*X"  # of validation sets, in turn


@dataclass(frozen=True)
class SetCurve:
    """The losses of one of several sets that are held out, by iteration."""

    name: str
    iteration: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Curves:
    """The metrics of a run as arrays; a null is NaN. `mtp_loss` and `validation_mtp_loss` are [points, depths].

    Of several sets that are held out `validation_*` are those of the first, and `sets` all of them.
    """

    label: str
    iteration: np.ndarray
    lm_loss: np.ndarray
    mtp_loss: np.ndarray
    learning_rate: np.ndarray
    grad_norm: np.ndarray
    validation_iteration: np.ndarray
    validation_lm_loss: np.ndarray
    validation_mtp_loss: np.ndarray
    sets: tuple[SetCurve, ...] = ()


def read_curves(path: Path, label: str) -> Curves:
    """Read a metrics.jsonl; raise ValueError if it has no step, or a value that is no number."""
    records = list(read_metrics(path))
    steps = [record for record in records if "lm_loss" in record]
    validations = [*_held_out(records), *(record for record in records if "validation_lm_loss" in record)]
    if not steps:
        raise ValueError(f"{path} holds no training step")
    try:
        return Curves(
            label, _column(steps, "iteration"), _column(steps, "lm_loss"), _table(steps, "mtp_loss"),
            _column(steps, "learning_rate"), _column(steps, "grad_norm"), _column(validations, "iteration"),
            _column(validations, "validation_lm_loss"), _table(validations, "validation_mtp_loss"), _sets(records))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a value that is no number: {error}") from error


def _held_out(records: list[dict]) -> list[dict]:
    """Return the evaluations of the first set that is held out, as those of a validation."""
    found = [record for record in records if "eval_loss" in record]
    return [{"iteration": record["iteration"], "validation_lm_loss": record["eval_loss"],
             "validation_mtp_loss": record.get("eval_mtp_loss")} for record in found
            if record["eval_set"] == found[0]["eval_set"]]


def _sets(records: list[dict]) -> tuple[SetCurve, ...]:
    """Return the losses of each set that is held out, of none where it is one alone, which needs no name."""
    of_name: dict[str, list[dict]] = {}
    for record in records:
        if "eval_loss" in record:
            of_name.setdefault(record["eval_set"], []).append(record)
    return tuple(SetCurve(str(name), _column(own, "iteration"), _column(own, "eval_loss"))
                 for name, own in of_name.items()) if len(of_name) > 1 else ()


def _column(records: list[dict], name: str) -> np.ndarray:
    return np.array([record.get(name) for record in records], dtype=float)


def _table(records: list[dict], name: str) -> np.ndarray:
    depths = max((len(record.get(name) or ()) for record in records), default=0)
    rows = [list(record.get(name) or ()) for record in records]
    return np.array([row + [None] * (depths - len(row)) for row in rows], dtype=float).reshape(len(records), depths)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over `window` values about each, fewer at the ends.

    The window is centred, since a trailing mean shows a falling loss late. Values that are not finite are left out, so
    that one bad step does not cut a hole as wide as the window.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.maximum(np.arange(len(values)) - (window - 1) // 2, 0)
    last = np.minimum(np.arange(len(values)) + window // 2 + 1, len(values))
    counted = counts[last] - counts[first]
    return np.divide(sums[last] - sums[first], counted, out=np.full(len(values), np.nan), where=counted > 0)


def draw(runs: list[Curves], output: Path) -> None:
    """Draw the runs over each other to the PNG `output`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (losses, rates, norms) = pyplot.subplots(
        3, 1, sharex=True, figsize=(9, 7.5), height_ratios=(4, 1, 1), layout="constrained")
    for run, color in zip(runs, (COLORS[i % len(COLORS)] for i in range(len(runs)))):
        _draw_losses(losses, run, color, f"{run.label}: " if len(runs) > 1 else "", one_run=len(runs) == 1)
        rates.plot(run.iteration, run.learning_rate, color=color, linewidth=1.5)
        norms.plot(run.iteration, run.grad_norm, color=color, linewidth=1.0)
    _frame_losses(losses, runs)
    rates.set_ylabel("learning\nrate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    rates.set_ylim(bottom=0)
    norms.set_ylabel("gradient\nnorm (L2)")
    norms.set_yscale("log")
    norms.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=4))
    norms.yaxis.set_major_formatter("{x:g}")
    norms.yaxis.set_minor_formatter(ticker.NullFormatter())
    norms.set_xlabel("iteration (optimizer steps)")
    norms.xaxis.set_major_locator(ticker.MaxNLocator(nbins=10, steps=(1, 2, 5, 10), integer=True))
    for axes in (losses, rates, norms):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def _draw_losses(axes, run: Curves, color: str, prefix: str, one_run: bool) -> None:
    """Draw a run's losses. With one run each MTP depth has its own colour; with several, the colour says which run."""
    window = max(1, len(run.iteration) // 50)
    mean = f", mean of {window} steps" if window > 1 else ""
    if window > 1:
        axes.plot(run.iteration, run.lm_loss, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(run.iteration, smooth(run.lm_loss, window), color=color, linewidth=1.8, label=f"{prefix}training{mean}")
    shown = run.sets or (SetCurve("", run.validation_iteration, run.validation_lm_loss),)
    for each, marker in zip(shown, cycle(MARKERS)):
        label = f"{prefix}validation {each.name}".rstrip() if len(each.iteration) else None
        axes.plot(each.iteration, each.loss, marker, color=color, markersize=5, markeredgecolor="white", label=label)
    for depth in range(run.mtp_loss.shape[1]):
        shade = COLORS[(depth + 1) % len(COLORS)] if one_run else color
        axes.plot(run.iteration, smooth(run.mtp_loss[:, depth], window), "--", color=shade, linewidth=1.2,
                  label=f"{prefix}training, MTP depth {depth + 1}")
    for depth in range(run.validation_mtp_loss.shape[1]):
        shade = COLORS[(depth + 1) % len(COLORS)] if one_run else color
        axes.plot(run.validation_iteration, run.validation_mtp_loss[:, depth], "s", color=shade, markersize=4,
                  markeredgecolor="white", label=_of_depth(run, depth) if one_run else None)


def _of_depth(run: Curves, depth: int) -> str:
    """Return the label of a run's validation points of an MTP depth; of several sets they are the first one's."""
    return f"validation {run.sets[0].name if run.sets else ''}".rstrip() + f", MTP depth {depth + 1}"


def _frame_losses(axes, runs: list[Curves]) -> None:
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(runs[0].label if len(runs) == 1 else "Loss of " + ", ".join(run.label for run in runs))
    axes.legend(frameon=False, fontsize="small")


def _draw_losses_of(files: list[Path], labels: list[str], output: Path) -> None:
    draw([read_curves(path, label) for path, label in zip(files, labels)], output)


def _draw_experts_of(files: list[Path], labels: list[str], output: Path) -> None:
    """Draw experts' load; raise ValueError for a run without routed experts, or two of one name."""
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing: runs of models with routed experts write it")
    if len(set(labels)) != len(labels):
        raise ValueError(f"--labels {' '.join(labels)}: two runs have one name")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(draw_load({label: read_history(path) for path, label in zip(files, labels)}))


def _draw_rewards_of(files: list[Path], labels: list[str], output: Path) -> None:
    draw_rewards([read_reward_curves(path, label) for path, label in zip(files, labels)], output)


# What --of names: the file in --save that it is read from, the picture's name, and who draws it.
_DRAWN = {"losses": ("metrics.jsonl", "loss.png", _draw_losses_of),
          "rewards": ("metrics.jsonl", "rewards.png", _draw_rewards_of),
          "experts": (EXPERT_LOAD, "experts.png", _draw_experts_of)}


def run(arguments: list[str]) -> int:
    parser = OneLineParser(prog=PROGRAM,
                           description="Draw the curves of one or several runs to a PNG.")
    parser.add_argument("metrics", nargs="+", type=values.path, metavar="METRICS.jsonl", help="or the --save of a run")
    parser.add_argument("--of", choices=_DRAWN, default="losses", help="what is drawn (losses)")
    parser.add_argument("--output", type=values.path, metavar="PNG",
                        help="default: loss.png, rewards.png or experts.png beside the first file")
    parser.add_argument("--labels", nargs="+", help="one name for each file; default: the directories' names")
    options = parser.parse_args(arguments)
    source, picture, draw_runs = _DRAWN[options.of]
    files = [path / source if path.is_dir() else path for path in options.metrics]
    output = options.output or files[0].with_name(picture)
    labels = options.labels or [path.resolve().parent.name for path in files]
    if output.is_dir():
        raise ValueError(f"--output {output} is a directory; give a file in it: {output / picture}")
    try:
        if len(labels) != len(files):
            raise ValueError(f"--labels {' '.join(labels)} names {len(labels)} runs, but there are {len(files)} files")
        draw_runs(files, labels, output)
    except ImportError as error:
        raise ValueError(f"drawing needs the package matplotlib ({error}): {how_to_install('matplotlib')}") from error
    print(output)
    return 0


def main(arguments: list[str]) -> int:
    return exit_status(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
