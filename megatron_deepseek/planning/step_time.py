"""How long a step takes: the pipeline by simulating its lists of actions, the data ranks' collectives, the optimizer.

    pipeline    every rank's acts, each beginning when its rank is free and what it needs has come (simulation.py)
    data ranks  weights are gathered beside the first micro-batch's forward, gradients reduced beside the last one's
                backward (parallel/stage.py): what is longer than those is added
    optimizer   one pass over gradients, masters and moments, on the device or the host

The rank that ends last decides. Rows of experts are taken to be balanced unless the job says otherwise.
"""

from dataclasses import dataclass

from megatron_deepseek.planning.actions import DUAL_PIPE, Act, Run, held_stages
from megatron_deepseek.planning.flops import model_flops_per_token
from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.layer_time import Machine
from megatron_deepseek.planning.simulation import Span, simulate
from megatron_deepseek.planning.stage_time import (
    Durations,
    Scales,
    durations,
    hop_seconds,
    machine_of,
    pairs_neighbours,
    without_travel,
)
from megatron_deepseek.planning.state_bytes import data_ranks
from megatron_deepseek.planning.held_parameters import held_parameters

HOST_UPDATE_BYTES = 100e9  # a second, of the host's memory for each rank while it updates


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and its parts: the pipeline's simulation by rank (`spans`), what data ranks exchange beside no
    computing, and the optimizer.
    """

    job: Job
    gpu: Gpu
    durations: Durations
    spans: list[list[Span]]
    data_seconds: float
    optimizer_seconds: float

    @property
    def pipeline_seconds(self) -> float:
        """Return when the last rank has done its list."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def step_seconds(self) -> float:
        """Return the seconds of a step."""
        return self.pipeline_seconds + self.data_seconds + self.optimizer_seconds

    @property
    def tokens(self) -> int:
        """Return the tokens of a step."""
        return self.job.settings.batch.global_batch_size * self.job.settings.data.seq_length

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Return the tokens of a second on one GPU."""
        return self.tokens / self.step_seconds / self.job.layout.world_size

    @property
    def gpu_hours_per_trillion(self) -> float:
        """Return the hours of one GPU that 10^12 tokens take."""
        return 1e12 / self.tokens_per_second_per_gpu / 3600

    @property
    def bubble(self) -> float:
        """Return the part of the pipeline's time in which ranks are idle, of all ranks together."""
        busy = sum(span.end - span.start for spans in self.spans for span in spans)
        return 1 - busy / (len(self.spans) * self.pipeline_seconds)

    @property
    def exposed(self) -> float:
        """Return the part of the pipeline's busy time that would not be there if nothing travelled between ranks."""
        still = without_travel(self.durations)
        acts = [self.job.actions(rank) for rank in range(self.job.layout.pp)]
        busy = sum(self.durations.act(act) for each in acts for act in each)
        return 1 - sum(still.act(act) for each in acts for act in each) / busy

    def busy(self, pp_rank: int) -> tuple[float, float]:
        """Return the seconds that a pipeline rank computes in a step, and those in which it sends and receives."""
        computes = travels = 0.0
        for act in self.job.actions(pp_rank):
            for run in act:
                each = self.durations.stages[run.stage]
                if run.kind == "F":
                    computes, travels = computes + each.forward, travels + each.sent + each.apart_forward
                    continue
                computes += each.inputs * (run.kind != "W") + each.weights * (run.kind != "I")
                travels += (each.returned + each.apart_backward) * (run.kind != "W")
        return computes, travels

    @property
    def mfu(self) -> float:
        """Return Model FLOPs Utilisation (flops.py) of the dense BF16 peak."""
        flops = model_flops_per_token(self.job.model, self.job.settings.data.seq_length)
        return flops * self.tokens_per_second_per_gpu / (self.gpu.bf16_tflops * 1e12)


def step_time(job: Job, gpu: Gpu, scales: Scales = Scales(), imbalance: float | None = None) -> StepTime:
    """Return the time of a step of `job` on `gpu`s."""
    machine = machine_of(job, gpu)
    found = durations(job, machine, scales, imbalance)
    spans = simulated(job, machine, found)
    return StepTime(job, gpu, found, spans, data_seconds(job, machine, found),
                    max(optimizer_seconds(job, machine, rank) for rank in range(job.layout.pp)))


def simulated(job: Job, machine: Machine, found: Durations) -> list[list[Span]]:
    """Return the spans of every pipeline rank's acts."""
    acts = acts_of(job)
    lasting: dict[tuple, float] = {}

    def duration(rank: int, act) -> float:
        key = tuple((run.kind, run.stage) for run in act)
        if key not in lasting:
            lasting[key] = found.act(act)
        return lasting[key]

    return simulate(acts, duration, len(job.stages) - 1, hops(job, machine, found.scales))


def acts_of(job: Job) -> list[list[Act]]:
    """Return what every pipeline rank does, as the job's engine overlaps it."""
    acts = [job.actions(rank) for rank in range(job.layout.pp)]
    return [paired(each) for each in acts] if pairs_neighbours(job) else acts


def paired(acts: list[Act]) -> list[Act]:
    """Return `acts` with each whole backward beside the forward behind it, as Megatron-LM's interleaved schedule does
    with one forward more in its warm-up.
    """
    found: list[Act] = []
    for act in acts:
        last = found[-1] if found else ()
        if act[0].kind == "F" and len(last) == len(act) == 1 and last[0].kind == "B":
            found[-1] = (*act, *last)
        else:
            found.append(act)
    return found


def hops(job: Job, machine: Machine, scales: Scales = Scales()):
    """Return the function that `simulate` asks for the seconds between stages."""
    dual, lasting = job.schedule == DUAL_PIPE, {}
    holders = {stage: rank for rank in range(job.layout.pp) for stage in job.held(rank) if not dual}

    def hop(run: Run) -> float:
        key = run.kind == "F", run.stage
        if key not in lasting:
            places = {stage: stage for stage in range(len(job.stages))} if dual else holders
            lasting[key] = scales.travelling * hop_seconds(job, machine, run, places)
        return lasting[key]

    return hop


def data_seconds(job: Job, machine: Machine, found: Durations) -> float:
    """Return the seconds of the fullest pipeline rank's gathers and reductions that nothing is computed beside."""
    return max(_data_seconds(job, machine, found, rank) for rank in range(job.layout.pp))


def _data_seconds(job: Job, machine: Machine, found: Durations, pp_rank: int) -> float:
    layout, engine, held = job.layout, job.engine, job.held(pp_rank)
    parameters = held_parameters(job.model, layout, [job.stages[stage] for stage in held])
    dense, experts = data_ranks(job)
    size = job.numbers.element if engine.name == "ours" else engine.weight

    def collectives(each: float) -> float:
        return found.scales.travelling * (
            machine.network.gather(each * parameters.dense, dense, layout.tp)
            + machine.network.gather(each * parameters.experts, experts, layout.ep * layout.etp))

    forward = sum(found.of_stage[stage]["F"] for stage in held)
    backward = sum(found.of_stage[stage]["B"] for stage in held)
    divided = engine.divides_weights or (engine.name == "ours" and job.settings.run.sharding == "optim_grads_params")
    times = job.micro_batches if divided else 1  # weights of units come and go with every micro-batch, both ways
    gathers = times * (max(0.0, collectives(size) - forward)
                       + (max(0.0, collectives(size) - backward) if divided else 0.0))
    return gathers + max(0.0, collectives(engine.gradient) - backward)


def optimizer_seconds(job: Job, machine: Machine, pp_rank: int) -> float:
    """Return the seconds of an update: gradients, masters and moments are read, the last two written."""
    held = held_parameters(job.model, job.layout,
                           [job.stages[stage] for stage in held_stages(job.schedule, job.layout.pp,
                                                                       job.virtual_stages, pp_rank)])
    dense, experts = data_ranks(job)
    parameters = held.dense / dense + held.experts / experts
    moved = parameters * (4 + 2 * (4 + job.engine.moments))
    if job.settings.offload.optimizer_cpu_offload or job.engine.host:
        return machine.rates.host(8 * parameters) + moved / HOST_UPDATE_BYTES  # gradients there, weights back
    return machine.rates.memory(moved)
