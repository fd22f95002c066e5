"""A planned step as a picture: pipeline ranks below each other, what they do from left to right. Needs matplotlib."""

from pathlib import Path

from megatron_deepseek.packages import how_to_install
from megatron_deepseek.planning.step_time import StepTime, acts_of
from megatron_deepseek.planning.trace import KINDS

# Okabe and Ito's colours, told apart by readers who see fewer of them.
COLOURS = {"F": "#56B4E9", "B": "#E69F00", "I": "#F0E442", "W": "#009E73"}
PAIR = "#CC79A7"
_HEIGHT, _SHOWN = 0.86, 150  # of a row; acts of the busiest rank that fit on the page


def draw_schedule(step: StepTime, path: Path) -> None:
    """Write a PNG. Of long steps the begin and the end are drawn, in which the bubbles are. Raise ValueError where
    matplotlib is missing or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"--picture: {how_to_install('matplotlib')}") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    ranks = len(step.spans)
    busiest = max(map(len, step.spans))
    parts = [(0.0, step.pipeline_seconds)]
    if busiest > _SHOWN:
        shown = step.pipeline_seconds * _SHOWN / busiest / 2
        parts = [(0.0, shown), (step.pipeline_seconds - shown, step.pipeline_seconds)]
    figure = Figure(figsize=(14, 1.6 + 0.3 * ranks), layout="constrained")
    every = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axes, (start, end) in zip(every, parts):
        for rank, (acts, spans) in enumerate(zip(acts_of(step.job), step.spans)):
            _bars(axes, rank, acts, spans, start, end)
        axes.set_xlim(start, end)
        axes.set_xlabel("seconds")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    every[0].set_ylim(ranks - 0.5, -0.5)
    every[0].set_yticks(range(ranks))
    every[0].set_ylabel("pipeline rank")
    used = {run.kind for acts in acts_of(step.job) for act in acts if len(act) == 1 for run in act}
    handles = [matplotlib.patches.Patch(color=COLOURS[kind], label=KINDS[kind]) for kind in COLOURS if kind in used]
    if any(len(act) > 1 for acts in acts_of(step.job) for act in acts):
        handles.append(matplotlib.patches.Patch(color=PAIR, label="forward beside backward"))
    figure.legend(handles=handles, ncols=5, fontsize=8, frameon=False, loc="outside lower center")
    calibrated = "" if step.durations.scales.source else ", not calibrated"
    figure.suptitle(f"{step.job.schedule if ranks > 1 else 'no pipeline'}, {ranks} pipeline ranks, "
                    f"{step.job.micro_batches} micro-batches on {step.gpu.name}: {step.pipeline_seconds:.2f} s, idle "
                    f"{step.bubble:.1%}{calibrated}" + (", begin and end" if len(parts) > 1 else ""), fontsize=10)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _bars(axes, rank: int, acts: list, spans: list, start: float, end: float) -> None:
    """Draw the acts of one rank between two times; darker edges part them, the number is the micro-batch's."""
    seen = [(act, span) for act, span in zip(acts, spans) if span.end > start and span.start < end]
    longest = max((span.end - span.start for _, span in seen), default=0.0)
    for act, span in seen:
        colour = PAIR if len(act) > 1 else COLOURS[act[0].kind]
        axes.barh(rank, span.end - span.start, _HEIGHT, span.start, color=colour, edgecolor="white", linewidth=0.3)
        if (end - start) / longest < 45:
            axes.text((span.start + span.end) / 2, rank, "+".join(str(run.micro_batch) for run in act), ha="center",
                      va="center", fontsize=5, clip_on=True)
