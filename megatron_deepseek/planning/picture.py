"""The memory of each pipeline rank as stacked bars, under the GPU's limit. Needs matplotlib."""

from pathlib import Path

from megatron_deepseek.packages import how_to_install
from megatron_deepseek.planning.memory import RankMemory
from megatron_deepseek.planning.report import GIB, MemoryPlan, gradients_here

# Okabe and Ito's colours, told apart by readers who see fewer of them.
PARTS = (("weights", "#0072B2"), ("gathered weights", "#56B4E9"), ("gradients", "#009E73"), ("optimizer", "#E69F00"),
         ("receive buffers", "#F0E442"), ("activations", "#D55E00"), ("other", "#CC79A7"))


def parts_of(memory: RankMemory) -> tuple[float, ...]:
    """Return the bytes of PARTS, in their order."""
    states, here = memory.states, not memory.states.on_host
    return (states.weights.all * here, states.gathered.all, gradients_here(states), states.optimizer.all * here,
            memory.receive, memory.activations, sum(memory.extra.values()))


def draw_memory(plan: MemoryPlan, path: Path) -> None:
    """Write a PNG. Raise ValueError where matplotlib is missing or the file cannot be written."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"--picture: {how_to_install('matplotlib')}") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.5 + 0.5 * len(plan.ranks)), 4.5), layout="constrained")
    axes = figure.subplots()
    places = [memory.pp_rank for memory in plan.ranks]
    bottom = [0.0] * len(plan.ranks)
    for (name, color), sizes in zip(PARTS, zip(*map(parts_of, plan.ranks))):
        heights = [size / GIB for size in sizes]
        if any(heights):
            axes.bar(places, heights, 0.8, bottom, color=color, label=name)
        bottom = [low + high for low, high in zip(bottom, heights)]
    low = [memory.low / GIB - base for memory, base in zip(plan.ranks, bottom)]
    high = [memory.high / GIB - memory.low / GIB for memory in plan.ranks]
    axes.bar(places, low, 0.8, bottom, color="#BBBBBB", label="context, NCCL, fragments: at least")
    axes.bar(places, high, 0.8, [base + each for base, each in zip(bottom, low)], color="#E4E4E4",
             label="and perhaps")
    limit = plan.limit / GIB
    axes.axhline(limit, color="black", linewidth=1)
    axes.set_xlim(places[0] - 1.6, places[-1] + 0.6)
    axes.text(places[0] - 1.5, limit, f"{plan.gpu.name}\n{limit:.1f} GiB", ha="left", va="bottom", fontsize=8)
    axes.set_ylim(0, 1.3 * max(limit, max(memory.high / GIB for memory in plan.ranks)))
    axes.set_xticks(places)
    axes.set_xlabel("pipeline rank")
    axes.set_ylabel("GiB on each GPU")
    axes.set_title(f"{plan.job.layout.world_size} x {plan.gpu.name}, {plan.task.name}, engine {plan.job.engine.name}: "
                   f"{plan.verdict}", fontsize=10)
    axes.legend(ncols=3, fontsize=7, frameon=False, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
