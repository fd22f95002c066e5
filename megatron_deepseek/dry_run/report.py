"""What a dry run has found, in words and as JSON."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.rank import RankStep
from megatron_deepseek.dry_run.timeline import Held, Level
from megatron_deepseek.parallel.schedule_rules import stages_of_rank
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.planning.words import aligned, parts_of_stage
from megatron_deepseek.settings import Settings

_GIB, _MIB = 2**30, 2**20


def lines(wanted: DryRun, settings: Settings, found: RankStep) -> Iterator[str]:
    """Yield the report on one rank."""
    made, whole = found.micro_batches, found.all_micro_batches
    yield f"rank {found.rank} of {settings.layout.world_size}: {_holds(settings, found)}" + (
        f", {made} of {whole} micro-batches" if made != whole else "")
    if wanted.memory:
        yield from memory_lines(found)
    if wanted.communication:
        yield from communication_lines(found)


def _holds(settings: Settings, found: RankStep) -> str:
    pp_rank = found.planned.pp_rank
    stages = resolve(settings.model, settings.pipeline, settings.layout.pp, settings.data.seq_length)
    held = stages_of_rank(pp_rank, len(stages), settings.layout.pp, settings.pipeline.schedule)
    return f"pipeline rank {pp_rank}, " + " | ".join(parts_of_stage(settings.model, stages[each]) for each in held)


def memory_lines(found: RankStep) -> Iterator[str]:
    """Yield the peak with its parts, the course of the step, and the largest tensors of the peak."""
    peak, planned = found.timeline.peak, found.planned.peak_bytes
    yield (f"  peak {peak.bytes / _GIB:.3f} GiB in {peak.act}; planned {planned / _GIB:.3f} GiB "
           f"({planned / peak.bytes - 1:+.1%})")
    names = list(peak.categories)
    rows = [("", "all", *names)]
    for name, level in (("at the peak", peak), *_course(found.timeline.levels)):
        rows.append((name, *(f"{size / _GIB:.3f}" for size in (level.bytes, *level.categories.values()))))
    yield from (f"  {line}" for line in aligned(rows))
    yield "  the largest tensors of the peak"
    rows = [("MiB", "kind", "shape", "made in", "what, or by which line")]
    rows += [(f"{each.bytes / _MIB:.1f}", each.category, _shape(each), each.act, each.of or each.line)
             for each in found.timeline.largest]
    yield from (f"    {line}" for line in aligned(rows))


def _shape(held: Held) -> str:
    return f"{held.dtype}{list(held.shape)}"


def _course(levels: Sequence[Level]) -> Iterator[tuple[str, Level]]:
    """Yield the moments that show a step: before it, the fullest of each kind of act, and its end."""
    yield levels[0].act, levels[0]
    fullest: dict[str, Level] = {}
    for level in levels[1:-1]:
        kind = level.act[0] if not level.act.startswith("after") else "between acts"
        if kind not in fullest or level.bytes > fullest[kind].bytes:
            fullest[kind] = level
    yield from ((f"fullest {kind}: {level.act}" if len(kind) == 1 else f"fullest {kind}", level)
                for kind, level in fullest.items())
    yield levels[-1].act, levels[-1]


def communication_lines(found: RankStep) -> Iterator[str]:
    """Yield a line for the collectives of equal kind, group and place: acts of a kind on a stage together."""
    counts, sent, received = Counter(), Counter(), Counter()
    for each in found.collectives:
        key = _place(each.place), each.kind, each.group, len(each.ranks)
        counts[key] += 1
        sent[key] += each.sent
        received[key] += each.received
    rows = [("in", "collective", "group", "ranks", "number", "MiB sent", "MiB received by recv")]
    rows += [(place, kind, group, str(ranks), str(count), f"{sent[key] / _MIB:.3f}", f"{received[key] / _MIB:.3f}")
             for key, count in counts.items() for place, kind, group, ranks in (key,)]
    yield f"  {len(found.collectives)} collectives, {sum(sent.values()) / _MIB:.3f} MiB sent"
    yield from (f"  {line}" for line in aligned(rows))


def _place(place: str) -> str:
    """Return the kind and stage of an act, without the micro-batch."""
    first, _, rest = place.rpartition(" of stage ")
    if not first:
        return place
    *after, act = first.split()
    return " ".join([*after, f"{act.rstrip('0123456789')} of stage {rest}"])


def as_json(wanted: DryRun, settings: Settings, found: Sequence[RankStep]) -> dict:
    """Return all numbers, for --dry-run-json."""
    return {"world_size": settings.layout.world_size, "device": wanted.device, "routing": wanted.routing,
            "ranks": [_rank_json(wanted, each) for each in found]}


def _rank_json(wanted: DryRun, found: RankStep) -> dict:
    result = {"rank": found.rank, "pp_rank": found.planned.pp_rank,
              "micro_batches": found.micro_batches}
    if wanted.memory:
        time = found.timeline
        result |= {"peak_bytes": time.peak.bytes, "planned_peak_bytes": round(found.planned.peak_bytes),
                   "peak": asdict(time.peak), "levels": [asdict(each) for each in time.levels],
                   "largest": [asdict(each) for each in time.largest]}
    if wanted.communication:
        result["collectives"] = [
            {"kind": each.kind, "group": each.group, "ranks": list(each.ranks), "sent_bytes": each.sent,
             "received_bytes": each.received, "peer": each.peer, "dtype": str(each.dtype).removeprefix("torch."),
             "place": each.place} for each in found.collectives]
    return result
