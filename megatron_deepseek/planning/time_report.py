"""The time of a step in words and as JSON."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_deepseek.planning.step_time import StepTime
from megatron_deepseek.planning.words import aligned, in_short

NOT_CALIBRATED = ("not calibrated: from data sheets and published efficiencies; --calibrate RUN takes the speeds of a "
                  "run of yours")


@dataclass(frozen=True)
class TimePlan:
    """A step, a line on its calibration (None without), and what a GPU costs for an hour (None if nobody said)."""

    step: StepTime
    calibration: str | None = None
    price: float | None = None

    @property
    def price_per_trillion(self) -> float | None:
        """Return what 10^12 tokens cost."""
        return None if self.price is None else self.price * self.step.gpu_hours_per_trillion


def time_lines(plan: TimePlan) -> Iterator[str]:
    """Yield the report: the job, a table of pipeline ranks, the step and its parts, what it costs."""
    step, job, layout = plan.step, plan.step.job, plan.step.job.layout
    yield (f"{layout.world_size} x {step.gpu.name}, engine {job.engine.name}: pp {layout.pp} x dp {layout.dp} x cp "
           f"{layout.cp} x tp {layout.tp}, experts edp {layout.edp} x ep {layout.ep} x etp {layout.etp}"
           + (f", {job.schedule}" if layout.pp > 1 else "") + f", {job.micro_batches} micro-batches")
    yield ""
    yield from _table(step)
    yield ""
    yield (f"step {step.step_seconds:.3f} s: pipeline {step.pipeline_seconds:.3f} (idle {step.bubble:.1%}, waiting for "
           f"other ranks' data {step.exposed:.1%} of the rest), data ranks {step.data_seconds:.3f}, optimizer "
           f"{step.optimizer_seconds:.3f}")
    yield (f"{step.tokens_per_second_per_gpu:,.0f} tokens a second and GPU, "
           f"{step.tokens_per_second_per_gpu * layout.world_size:,.0f} in all, MFU {step.mfu:.1%} of dense BF16")
    money = "" if plan.price_per_trillion is None else f", {plan.price_per_trillion:,.0f} at {plan.price:g} a GPU hour"
    yield f"{step.gpu_hours_per_trillion:,.0f} GPU hours for 10^12 tokens{money}"
    yield plan.calibration or NOT_CALIBRATED


def _table(step: StepTime) -> Iterator[str]:
    """Yield a line for each pipeline rank: the milliseconds of its stages' runs, and how long it is idle."""
    rows = [("pipeline rank", "stages", "ms: F", "B", "I", "W", "sent in F", "in B", "idle")]
    for rank, spans in enumerate(step.spans):
        held = step.job.held(rank)
        each = [step.durations.of_stage[stage] for stage in held]
        busy = sum(span.end - span.start for span in spans)
        rows.append((str(rank), in_short(held), *(" + ".join(f"{stage[kind] * 1e3:.1f}" for stage in each)
                                                  for kind in "FBIW"),
                     *(" + ".join(f"{getattr(step.durations.stages[stage], name) * 1e3:.1f}" for stage in held)
                       for name in ("sent", "returned")), f"{1 - busy / step.pipeline_seconds:.1%}"))
    yield from aligned(rows)


def time_json(plan: TimePlan) -> dict:
    """Return the plan's time for --json."""
    step = plan.step
    found = {"gpu": step.gpu.name, "engine": step.job.engine.name, "step_seconds": step.step_seconds,
             "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu, "tokens": step.tokens,
             "gpu_hours_per_trillion_tokens": step.gpu_hours_per_trillion, "mfu": step.mfu,
             "pipeline_seconds": step.pipeline_seconds, "data_seconds": step.data_seconds,
             "optimizer_seconds": step.optimizer_seconds, "bubble": step.bubble, "exposed": step.exposed,
             "calibrated": plan.calibration is not None, "calibration": plan.calibration or "not calibrated",
             "stages": [{kind: seconds for kind, seconds in each.items()} for each in step.durations.of_stage]}
    if plan.price_per_trillion is not None:
        found["price_per_trillion_tokens"] = plan.price_per_trillion
    return found
