"""What a search found, in words and as JSON; where nothing fits, what is closest and what would have to change."""

from collections.abc import Iterator, Sequence

from megatron_deepseek.planning.candidates import Choice
from megatron_deepseek.planning.changes import changes
from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.search import Found, Plan
from megatron_deepseek.planning.tasks import Task
from megatron_deepseek.planning.time_report import NOT_CALIBRATED
from megatron_deepseek.planning.words import aligned

GIB = 2**30


def search_lines(found: Found, job: Job, gpu: Gpu, limit: float, world_size: int, said: Sequence[str],
                 calibration: str | None) -> Iterator[str]:
    """Yield the report; `said` has the arguments of each plan."""
    settings = job.settings
    yield (f"{world_size} x {gpu.name}, {limit / GIB:.1f} GiB each, {settings.batch.global_batch_size} sequences of "
           f"{settings.data.seq_length} tokens a step: {found.looked_at} layouts cut and simulated of "
           f"{found.lanes} x schedules x recomputation x offloading")
    yield ""
    if not found.plans:
        yield from nothing_fits(found, gpu, limit, world_size)
        return
    head = ("", "step s", "tokens/s/GPU", "idle", "GiB", "tp", "pp", "cp", "ep", "etp", "schedule", "tokens by",
            "micro", "again", "offload", "sharding")
    yield from aligned([head, *map(_row, enumerate(found.plans, 1))])
    yield ""
    yield "the first one's arguments:"
    yield f"  {said[0]}"
    yield calibration or NOT_CALIBRATED


def _row(numbered: tuple[int, Plan]) -> tuple[str, ...]:
    number, plan = numbered
    choice, lane, step = plan.choice, plan.choice.lane, plan.step
    schedule = f"{choice.schedule}" + (f" x {choice.virtual}" if choice.virtual > 1 else "") if choice.pp > 1 else "-"
    return (str(number), f"{step.step_seconds:.3f}", f"{step.tokens_per_second_per_gpu:,.0f}", f"{step.bubble:.1%}",
            f"{_needs(plan):.1f}", str(lane.tp), str(choice.pp), str(lane.cp), str(lane.ep), str(lane.etp), schedule,
            lane.dispatcher if lane.ep > 1 else "-", str(lane.micro_batch), again(choice), str(choice.offloaded),
            choice.sharding)


def again(choice: Choice) -> str:
    """Return what a choice recomputes, in words."""
    return ",".join(choice.modules) or choice.granularity or "nothing"


def _needs(plan: Plan) -> float:
    return max(rank.high for rank in plan.memory) / GIB


def nothing_fits(found: Found, gpu: Gpu, limit: float, world_size: int) -> Iterator[str]:
    """Yield what is closest to fitting, and what would have to change."""
    if found.closest is None:
        yield f"no layout of {world_size} ranks is allowed by the arguments"
        return
    choice, job, needs = found.closest
    lane = choice.lane
    yield (f"nothing fits on {world_size} x {gpu.name} with {limit / GIB:.1f} GiB: the closest needs "
           f"{needs.high / GIB:.1f} GiB on pipeline rank {needs.pp_rank} (tp {lane.tp}, pp {choice.pp}, cp {lane.cp}, "
           f"ep {lane.ep}, {choice.schedule}, {again(choice)} recomputed, {choice.offloaded} layers of a stage "
           f"offloaded, {choice.sharding}); to fit:")
    yield from changes(job, gpu, limit, Task())


def search_json(found: Found, said: Sequence[str], calibration: str | None) -> dict:
    """Return the search for --json."""
    plans = [{"arguments": words, "step_seconds": plan.step.step_seconds,
              "tokens_per_second_per_gpu": plan.step.tokens_per_second_per_gpu, "bubble": plan.step.bubble,
              "needs_bytes": round(max(rank.high for rank in plan.memory)), "values": dict(plan.values)}
             for plan, words in zip(found.plans, said)]
    closest = None if found.closest is None else {"needs_bytes": round(found.closest[2].high)}
    return {"plans": plans, "looked_at": found.looked_at, "lanes": found.lanes, "closest": closest,
            "calibration": calibration or "not calibrated"}
