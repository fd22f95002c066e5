"""Experts' load as a picture: the violation over time, and below it each run's layers x experts. Needs matplotlib."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_deepseek.runtime.expert_load import ExpertLoad, LoadHistory

# Okabe and Ito's colours, which readers with colour blindness can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_ROW_INCHES, _LEAST_INCHES, _MOST_INCHES = 0.14, 1.4, 9.0  # height of a layer, of a map, of all maps
_BRIGHTEST = 2.0  # times the mean: what is above has the same colour


def draw_load(runs: Mapping[str, LoadHistory]) -> bytes:
    """Return a PNG of the runs by their names. Raise ImportError where matplotlib is missing."""
    from matplotlib.figure import Figure

    maps = {name: history.last for name, history in runs.items() if history.last is not None}
    most = max(_LEAST_INCHES, _MOST_INCHES / max(len(maps), 1))
    heights = [2.6, *(float(np.clip(_ROW_INCHES * len(load.counts), _LEAST_INCHES, most)) for load in maps.values())]
    figure = Figure(figsize=(9, sum(heights) + 0.9 * len(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_violation(axes[0], runs)
    for each, (name, load) in zip(axes[1:], maps.items()):
        image = _draw_map(each, load, name if len(runs) > 1 else "")
        figure.colorbar(image, ax=each, extend="max", aspect=30, pad=0.01, ticks=(0, 0.5, 1, 1.5, 2)).set_label(
            "tokens / mean")
    output = io.BytesIO()
    figure.savefig(output, dpi=120, format="png")
    return output.getvalue()


def _draw_violation(axes: Any, runs: Mapping[str, LoadHistory]) -> None:
    """Draw for each run the layer with the largest violation, and the median of the layers."""
    for color, (name, history) in zip((COLORS[n % len(COLORS)] for n in range(len(runs))), runs.items()):
        before, steps = f"{name}: " if len(runs) > 1 else "", [step for step, _ in history.violations]
        layers = [list(violation.values()) for _, violation in history.violations]
        few = "o" if len(steps) < 3 else ""
        axes.plot(steps, [max(values) for values in layers], few + "-", color=color, linewidth=1.6, markersize=4,
                  label=f"{before}largest of the layers")
        axes.plot(steps, [float(np.median(values)) for values in layers], few + "--", color=color, linewidth=1.1,
                  markersize=4, label=f"{before}median of the layers")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("iteration (optimizer steps)")
    axes.set_ylabel("busiest expert / mean - 1")
    axes.set_title("Load violation of experts")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def _draw_map(axes: Any, load: ExpertLoad, name: str) -> Any:
    """Draw layers from above, experts from the left; white is the mean."""
    from matplotlib.colors import TwoSlopeNorm

    counts_LE = np.array(list(load.counts.values()), dtype=float)
    relative_LE = counts_LE / counts_LE.mean(axis=1, keepdims=True)
    image = axes.imshow(relative_LE, aspect="auto", interpolation="nearest", cmap="RdBu_r",
                        norm=TwoSlopeNorm(1.0, 0.0, _BRIGHTEST))
    layers, step = list(load.counts), max(1, -(-len(load.counts) // 16))
    axes.set_yticks(range(0, len(layers), step), [str(layers[row]) for row in range(0, len(layers), step)])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    first = load.iteration - load.steps + 1
    steps = f"steps {first} to {load.iteration}" if load.steps > 1 else f"step {load.iteration}"
    axes.set_title(f"{name}: {steps}" if name else f"Tokens of each expert, {steps}")
    return image
