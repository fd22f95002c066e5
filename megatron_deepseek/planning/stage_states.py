"""Gathered weights and gradients of one stage, phase by phase (phases.py), and by FSDP's units: what comes and goes
while a backward runs.

A unit is a layer's routed experts, all else of a layer, or what a stage holds outside of layers. FSDP gathers and
reduces each as one (parallel/data.py): its gradients are in the layers' dtype until its backward is over, and are then
added to the sums, or reduced: copied side by side into one float32 buffer, which the data ranks divide. With one data
rank the buffer is the reduced gradient.

Other engines have the same all the time: theirs are with what stands (state_bytes.py), and nothing is counted here.
"""

from dataclasses import dataclass, replace

from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.schedule_rules import VIRTUAL_STAGES
from megatron_deepseek.planning.head import chunk_of
from megatron_deepseek.planning.held_parameters import Held, held_adapters, held_parameters
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.phases import BEFORE, BEGUN, FREED_BY_FORWARDS, GATHERED, KEPT, PHASES, REDUCED, SUMMED
from megatron_deepseek.planning.state_bytes import Divided, data_ranks, gathered_for_the_step, gathered_weights

NOTHING = Held(0, 0)


@dataclass(frozen=True)
class Passing:
    """Bytes of a stage in a phase: gathered weights, sums of gradients, reduced gradients."""

    gathered: Divided = Divided()
    sums: Divided = Divided()
    reduced: Divided = Divided()

    @property
    def all(self) -> float:
        """Return their sum."""
        return self.gathered.all + self.sums.all + self.reduced.all


@dataclass(frozen=True)
class Sizes:
    """Bytes of a parameter: `gradient` in the layers' dtype, `gathered`, `sum` (0 where nothing is summed), `whole` in
    the buffer that is reduced, and, of a dense one and of one of routed experts, `reduced` on the device and `output`,
    what the reduction gives beside that buffer.
    """

    gradient: int
    gathered: int
    sum: int
    whole: int
    reduced: tuple[float, float]
    output: tuple[float, float]

    def of_output(self, held: Held) -> float:
        """Return the bytes of what a reduction gives before anything is sent to the host."""
        return held.padded.dense * self.output[0] + held.padded.experts * self.output[1]

    def of_reduced(self, held: Held) -> float:
        """Return the bytes of reduced gradients."""
        return held.padded.dense * self.reduced[0] + held.padded.experts * self.reduced[1]


def sizes(job: Job) -> Sizes:
    """Return what a parameter takes in this project's engine, and nothing in others."""
    if not job.engine.gradient_apart:
        return Sizes(0, 0, 0, 0, (0.0, 0.0), (0.0, 0.0))
    engine, ranks = job.engine, data_ranks(job)
    here = 0 if job.settings.offload.optimizer_cpu_offload else engine.reduced
    return Sizes(job.numbers.element, job.numbers.element if gathered_for_the_step(job) else 0,
                 int(engine.gradient) if sums(job) else 0, int(engine.gradient),
                 tuple(here / each for each in ranks),
                 tuple(engine.reduced / each if each > 1 else 0.0 for each in ranks))


def sums(job: Job) -> bool:
    """Return whether gradients are summed before they are reduced."""
    return job.micro_batches > 1 or job.splits_backwards


def passing(job: Job, stage: int, phase: int) -> Passing:
    """Return what a stage has in a phase."""
    if not job.engine.gradient_apart:
        return Passing()
    part, size = [job.stages[stage]], sizes(job)
    if phase == REDUCED:
        held = trained(job, job.stages[stage]).padded
        return Passing(reduced=Divided(held.dense * size.reduced[0], held.experts * size.reduced[1]))
    if phase == BEFORE:
        return Passing(_gathered_ahead(job, gathered_weights(job, part)))
    gathered = gathered_weights(job, part) if gathered_for_the_step(job) else Divided()
    if job.freed_by_forwards and phase in FREED_BY_FORWARDS:
        gathered = Divided()
    phase = KEPT.get(phase, phase)
    held = {GATHERED: NOTHING, BEGUN: made_with_inputs(job, stage), SUMMED: trained(job, job.stages[stage])}[phase]
    return Passing(gathered, Divided(size.sum * held.dense, size.sum * held.experts))


def states_of_phases(job: Job, stage: int) -> tuple[int, ...]:
    """Return the bytes of a stage in each phase, 0 in those that its job does not know."""
    return tuple(round(passing(job, stage, phase).all) if job.regathers or phase not in KEPT else 0 for phase in PHASES)


def gathers_ahead(job: Job) -> bool:
    """Return whether torch's runtime for several stages begins to gather their weights before their first forwards."""
    return job.layout.pp > 1 and VIRTUAL_STAGES.get(job.schedule, 2) > 1


def _gathered_ahead(job: Job, gathered: Divided) -> Divided:
    """Return what of a stage is gathered before its first forward: torch's runtime for several stages begins to gather
    those of all before the rank's first act, which takes memory where there are other data ranks.
    """
    if not gathers_ahead(job):
        return Divided()
    dense, experts = data_ranks(job)
    return Divided(gathered.dense * (dense > 1), gathered.experts * (experts > 1))


def trained(job: Job, part: Stage) -> Held:
    """Return the parameters of a part of the model that have gradients."""
    settings = job.settings
    if settings.lora is not None:
        return held_adapters(job.model, job.layout, [part], settings.lora)
    return held_parameters(job.model, job.layout, [part], settings.run.freeze_parameters)


def made_with_inputs(job: Job, stage: int) -> Held:
    """Return the parameters whose gradients a backward of the inputs makes: those of the embedding, and of the head
    where its logits are made by chunks.
    """
    part = job.stages[stage]
    chunks = chunk_of(job.shapes(), job.settings.loss.loss_chunk_size) is not None
    outer = trained(job, Stage(bool(part.embedding or part.mtp), (), (), part.loss and chunks))
    return replace(outer, experts=0, experts_padding=0)
