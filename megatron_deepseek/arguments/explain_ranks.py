"""The tables of --explain-layout: one of pipeline ranks, and one of the places inside each of them.

Ranks that compute with the same weights stand in one line, so that a layout over thousands of ranks fits on a page.
"""

from collections.abc import Iterator, Sequence

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.schedule_rules import stages_of_rank
from megatron_deepseek.planning.pipeline_balance import resolve, stage_cost
from megatron_deepseek.planning.words import aligned, in_short, parts_of_stage
from megatron_deepseek.settings import Settings

_MOST_LINES = 16  # of the table of places; --all lists every rank


def places(rank: int, layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Return the coordinates of `rank` on the dense mesh (pp, dp, cp, tp) and the expert mesh (pp, edp, ep, etp)."""
    result = []
    for axes in (("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")):
        rest, coordinates = rank, {}
        for axis in axes:
            rest, coordinates[axis] = divmod(rest, getattr(layout, axis))
        result.append(coordinates)
    return result[0], result[1]


def pipeline_ranks(settings: Settings) -> Iterator[str]:
    """Yield a line for each pipeline rank: its ranks, its stages with their part of the work, and what they hold."""
    layout, model, schedule = settings.layout, settings.model, settings.pipeline.schedule
    stages = resolve(model, settings.pipeline, layout.pp, settings.data.seq_length)
    each = layout.world_size // layout.pp
    costs = [stage_cost(model, stage, settings.data.seq_length) for stage in stages]
    rows = [("pipeline rank", "ranks", "stages", "work", "holds")]
    for pp_rank in range(layout.pp):
        mine = stages_of_rank(pp_rank, len(stages), layout.pp, schedule)
        rows.append((str(pp_rank), in_short(range(pp_rank * each, (pp_rank + 1) * each)), ", ".join(map(str, mine)),
                     f"{sum(costs[index] for index in mine) / sum(costs):.1%}",
                     " | ".join(parts_of_stage(model, stages[index]) for index in mine)))
    yield from aligned(rows)


def places_of_pipeline_rank(settings: Settings) -> Iterator[str]:
    """Yield a line for each place inside a pipeline rank: the ranks there, and their slices, chunks and experts."""
    layout, model = settings.layout, settings.model
    together: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size // layout.pp):
        dense, expert = places(rank, layout)
        together.setdefault((dense["tp"], dense["cp"], expert["ep"], expert["etp"]), []).append(rank)
    rows = [(in_short(ranks), _slice(tp, layout.tp), _chunks(cp, layout.cp), _experts(model, layout, ep, etp))
            for (tp, cp, ep, etp), ranks in sorted(together.items(), key=lambda item: item[1])]
    yield ("the ranks of one pipeline rank, counted from its first; those of a line compute with the same weights, on "
           "other samples")
    lines = list(aligned([("ranks", "dense matrices", "chunks of a sequence", "experts"), *rows]))
    if len(lines) > 1 + _MOST_LINES:
        left_out = len(lines) - 1 - _MOST_LINES
        lines[_MOST_LINES:-1] = [f"... {left_out} lines more; --all lists every rank"]
    yield from lines


def every_rank(settings: Settings) -> Iterator[str]:
    """Yield a line for each rank, with its place on both meshes."""
    layout, model, schedule = settings.layout, settings.model, settings.pipeline.schedule
    stages = resolve(model, settings.pipeline, layout.pp, settings.data.seq_length)
    rows = [("rank", "pp", "dp", "cp", "tp", "edp", "ep", "etp", "stages", "experts", "chunks of a sequence")]
    for rank in range(layout.world_size):
        dense, expert = places(rank, layout)
        held = stages_of_rank(dense["pp"], len(stages), layout.pp, schedule)
        routed = any(map(model.is_moe_layer, _layers(model, [stages[index] for index in held])))
        rows.append((*map(str, (rank, *(dense[axis] for axis in ("pp", "dp", "cp", "tp")),
                                *(expert[axis] for axis in ("edp", "ep", "etp")))), ",".join(map(str, held)),
                     _experts(model, layout, expert["ep"], expert["etp"]) if routed else "none",
                     _chunks(dense["cp"], layout.cp)))
    yield from aligned(rows)


def _layers(model: ModelConfig, stages: Sequence[Stage]) -> list[int]:
    """Return the numbers of all layers of `stages`, those of MTP modules included."""
    return [index for stage in stages for index in
            (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))]


def _slice(place: int, size: int) -> str:
    return "whole" if size == 1 else f"slice {place} of {size}"


def _chunks(place: int, size: int) -> str:
    return "all" if size == 1 else f"{place}, {2 * size - 1 - place} of {2 * size}"


def _experts(model: ModelConfig, layout: Layout, ep: int, etp: int) -> str:
    """Say which experts a rank holds of each layer that has any, and which part of each."""
    if not model.n_routed_experts:
        return "none"
    each = model.n_routed_experts // layout.ep
    return in_short(range(ep * each, (ep + 1) * each)) + (f", {_slice(etp, layout.etp)}" if layout.etp > 1 else "")
