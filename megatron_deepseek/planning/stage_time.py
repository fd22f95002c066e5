"""How long a pipeline rank takes for each act of its list: forwards, backwards and pairs of them, stage by stage.

What travels to experts stands in the way of a stage's computing, but for what shared experts compute meanwhile where
they overlap, and for pairs, whose halves compute while the other's tokens travel (parallel/micro_batch_overlap.py;
DualPipe's, arXiv 2412.19437, section 3.2.1). In a pair links are slower, since kernels share the GPU: in the trace of
deepseek-ai/profile-data at 28 to 38 GB/s of the 51 that DeepEP reaches alone. Of the shorter of computing and
travelling some is not hidden there either: 4.2 of 113 ms.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_deepseek.planning.actions import DUAL_PIPE, Act, Run
from megatron_deepseek.planning.efficiency import PASSES_BACKWARD, PASSES_FORWARD, Rates
from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.head import chunk_of
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.layer_time import Machine, Seconds, layer_seconds
from megatron_deepseek.planning.network import Network
from megatron_deepseek.planning.products import head_product
from megatron_deepseek.planning.stage_bytes import states_after

SLOWER_LINKS = 1 / 0.65  # while the GPU computes beside them
NOT_HIDDEN = 0.04  # of the shorter half of a pair


@dataclass(frozen=True)
class Scales:
    """What calibration multiplies: seconds of computing, and of what travels between ranks. `source`: the run it is
    from, None for a plan that was not calibrated.
    """

    computing: float = 1.0
    travelling: float = 1.0
    source: str | None = None


def machine_of(job: Job, gpu: Gpu) -> Machine:
    """Return the machine of a job's ranks on nodes of `gpu`s."""
    communication = job.settings.communication
    network = Network(gpu, min(communication.moe_ranks_per_node or gpu.scale_up_gpus, gpu.scale_up_gpus))
    return Machine(Rates(gpu), network, communication.cp_comm_type == "ring", job.engine.name != "ours")


def stage_seconds(job: Job, machine: Machine, stage: int, imbalance: float | None = None) -> Seconds:
    """Return the seconds of one micro-batch on `stage`: its layers by their modes, and the head."""
    shapes = job.shapes(imbalance)
    found = Seconds()
    for index, mode in zip(job.layers_of(stage), job.modes_of(stage)):
        found += layer_seconds(machine, shapes, index, mode)
    return found + head_seconds(job, machine) if job.stages[stage].loss else found


def head_seconds(job: Job, machine: Machine) -> Seconds:
    """Return the seconds of the head and its loss for all predictions. Where logits are made by chunks, a forward makes
    the input's gradient too, and a backward multiplies once more.
    """
    shapes = job.shapes()
    product, element = head_product(shapes), shapes.numbers.element
    once = machine.rates.product(product, element)
    passes = machine.rates.memory(shapes.numbers.plain(product.rows, product.columns))
    hidden = shapes.numbers.plain(product.rows, product.width)
    apart = machine.network.gather(hidden, shapes.layout.tp, 1)
    chunked = job.engine.logit_bytes is None and chunk_of(shapes, job.settings.loss.loss_chunk_size) is not None
    extra = once if chunked else 0.0
    return Seconds(once + PASSES_FORWARD * passes, once + extra + PASSES_BACKWARD * passes / 2, once,
                   apart_forward=apart, apart_backward=apart)


@dataclass(frozen=True)
class Durations:
    """The seconds of every act of a job, from those of its stages. `shared_overlap`: of pairless runs shared experts
    compute beside travelling tokens; `pairs_overlap`: the halves of pairs hide each other's travelling.
    """

    stages: tuple[Seconds, ...]
    scales: Scales
    shared_overlap: bool
    pairs_overlap: bool

    @cached_property
    def of_stage(self) -> tuple[dict[str, float], ...]:
        """Return for each stage the seconds of F, B, I and W by themselves."""
        return tuple(self._alone(each) for each in self.stages)

    def _alone(self, each: Seconds) -> dict[str, float]:
        compute, travel = self.scales.computing, self.scales.travelling
        there, back = each.sent * travel, each.returned * travel
        if self.shared_overlap:
            there = max(0.0, there - each.beside_forward * compute)
            back = max(0.0, back - each.beside_backward * compute)
        inputs = each.inputs * compute + back + each.apart_backward * travel
        weights = each.weights * compute
        return {"F": each.forward * compute + there + each.apart_forward * travel,
                "B": inputs + weights, "I": inputs, "W": weights}

    def act(self, act: Act) -> float:
        """Return the seconds of an act."""
        if len(act) == 1 or not self.pairs_overlap:
            return sum(self.of_stage[run.stage][run.kind] for run in act)
        return self._pair(act)

    def of_parts(self) -> tuple[float, ...]:
        """Return for each stage the least that it adds to a micro-batch's seconds on a rank, if stages are put
        together: of pairs the sum of computing or of travelling, whichever is more for all.
        """
        if not self.pairs_overlap:
            return tuple(each["F"] + each["B"] for each in self.of_stage)
        acts = [(Run("F", at, 0), Run("B", at, 0)) for at in range(len(self.stages))]
        computes, travels = tuple(map(self.computes, acts)), tuple(map(self.travels, acts))
        more, less = (computes, travels) if sum(computes) >= sum(travels) else (travels, computes)
        return tuple(much + NOT_HIDDEN * little + self._apart(act) for much, little, act in zip(more, less, acts))

    def computes(self, act: Act) -> float:
        """Return the seconds that the runs of an act compute."""
        found = 0.0
        for run in act:
            each = self.stages[run.stage]
            found += each.forward if run.kind == "F" else (
                each.inputs * (run.kind != "W") + each.weights * (run.kind != "I"))
        return found * self.scales.computing

    def travels(self, act: Act) -> float:
        """Return the seconds in which tokens of the runs of a pair travel, while the GPU computes too."""
        found = sum(self.stages[run.stage].sent if run.kind == "F" else self.stages[run.stage].returned for run in act)
        return found * self.scales.travelling * SLOWER_LINKS

    def _apart(self, act: Act) -> float:
        return self.scales.travelling * sum(
            self.stages[run.stage].apart_forward if run.kind == "F" else self.stages[run.stage].apart_backward
            for run in act)

    def _pair(self, act: Act) -> float:
        compute, travel = self.computes(act), self.travels(act)
        return max(compute, travel) + NOT_HIDDEN * min(compute, travel) + self._apart(act)


def pairs_neighbours(job: Job) -> bool:
    """Return whether the engine overlaps the backwards and forwards that follow each other: Megatron-LM does so with
    --overlap-moe-expert-parallel-comm, for which it needs several stages on a rank.
    """
    return job.engine.name == "megatron" and job.schedule == "Interleaved1F1B" and job.layout.ep > 1


def durations(job: Job, machine: Machine, scales: Scales = Scales(), imbalance: float | None = None) -> Durations:
    """Return the seconds of every act of a job."""
    communication = job.settings.communication
    overlap = (job.schedule == DUAL_PIPE or pairs_neighbours(job)
               or communication.overlap_moe_expert_parallel_comm)
    stages = tuple(stage_seconds(job, machine, stage, imbalance) for stage in range(len(job.stages)))
    return Durations(stages, scales, communication.moe_shared_expert_overlap and job.cuda, overlap)


def hop_seconds(job: Job, machine: Machine, run: Run, holders: dict[int, int]) -> float:
    """Return the seconds until what `run` made is with the next stage: nothing where one rank holds both."""
    to = run.stage + 1 if run.kind == "F" else run.stage - 1
    if holders[to] == holders[run.stage]:
        return 0.0
    shapes = job.shapes()
    states = states_after(job, min(run.stage, to))
    return machine.network.message(states * shapes.numbers.plain(shapes.stream, job.model.hidden_size),
                                   job.layout.world_size // job.layout.pp)


def without_travel(durations_: Durations) -> Durations:
    """Return durations in which nothing travels between ranks."""
    still = {"sent": 0.0, "returned": 0.0, "apart_forward": 0.0, "apart_backward": 0.0}
    return replace(durations_, stages=tuple(replace(each, **still) for each in durations_.stages))
