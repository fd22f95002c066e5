"""The least time that a choice can take, quickly: what a search looks at before it cuts a model and simulates.

A lane's layers are priced once for each way to recompute. What a pipeline adds is arithmetic: the busiest rank has at
least its share of the work, at least so many whole layers that all ranks together have room for them, and before and
behind its micro-batches it waits while the pipeline fills and empties.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.planning.candidates import Choice, Lane, options
from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.layer_bytes import layer_bytes
from megatron_deepseek.planning.layer_time import layer_seconds
from megatron_deepseek.planning.overheads import overheads
from megatron_deepseek.planning.phases import SUMMED
from megatron_deepseek.planning.rank_costs import enough_micro_batches, worst_moments
from megatron_deepseek.planning.replay import Moment
from megatron_deepseek.planning.stage_time import Durations, Scales, head_seconds, machine_of
from megatron_deepseek.planning.state_bytes import standing_states, state_parts
from megatron_deepseek.settings import PipelineSettings, Settings

# Of a stage's forward and backward, what the first and last micro-batch cost a rank beside its own work at least.
_FILLS = {"GPipe": 1.0, "1F1B": 1.0, "LoopedBFS": 1.0, "Interleaved1F1B": 1.0, "InterleavedZeroBubble": 0.3}


@dataclass(frozen=True)
class Priced:
    """The price of one micro-batch with nothing else on the machine.

    `alone`: seconds of each part of the model; `paired`: the same where forwards and backwards hide each other's
    tokens. `kept`: bytes of a layer with experts (of a dense one in models without), `running` while its backward runs,
    `offloaded` what of it is left on the device; `host_seconds`: what its way to the host and back takes.
    """

    alone: tuple[float, ...]
    paired: tuple[float, ...]
    kept: float
    running: float
    offloaded: float
    host_seconds: float


def settings_of(base: Settings, choice: Choice, world_size: int, ranks_per_node: int) -> Settings:
    """Return the settings of a choice, as arguments/settings.py would make them, with stages left to be balanced."""
    lane, given = choice.lane, options(choice, base.model, ranks_per_node)
    layout = replace(base.layout, dp=world_size // (choice.pp * lane.tp * lane.cp), pp=choice.pp, tp=lane.tp,
                     cp=lane.cp, ep=lane.ep, etp=lane.etp, sequence_parallel=lane.tp > 1)
    communication = replace(base.communication, moe_token_dispatcher_type=lane.dispatcher,
                            moe_ranks_per_node=ranks_per_node,
                            overlap_moe_expert_parallel_comm=given["overlap_moe_expert_parallel_comm"],
                            moe_shared_expert_overlap=given["moe_shared_expert_overlap"])
    offload = replace(base.offload, cpu_offloading_num_layers=choice.offloaded)
    return replace(base, layout=layout, pipeline=PipelineSettings(choice.schedule, None, choice.virtual),
                   batch=replace(base.batch, micro_batch_size=lane.micro_batch), communication=communication,
                   recompute=choice.recompute, offload=offload, run=replace(base.run, sharding=choice.sharding))


@lru_cache(8192)
def waiting_micro_batches(schedule: str, pp: int, virtual: int, micro_batches: int) -> tuple[tuple[int, bool], ...]:
    """Return for each pipeline rank of how many micro-batches it keeps a layer at its peak, at least, and whether it
    has the sums of all its gradients there: the count grows or falls along the ranks, so three of them are looked at.
    """
    if pp == 1:
        return ((1, micro_batches > 2),)
    looked = sorted({0, pp // 2, pp - 1})
    found = {rank: _most_kept(worst_moments(schedule, pp, virtual, micro_batches, rank)) for rank in looked}
    ends = [(found[max(each for each in looked if each <= rank)], found[min(each for each in looked if each >= rank)])
            for rank in range(pp)]
    return tuple((min(one[0], other[0]), one[1] and other[1]) for one, other in ends)


def _most_kept(found: tuple[Moment, ...]) -> tuple[int, bool]:
    """Return how many micro-batches of every stage are kept at once, at most, and whether that is while the sums of all
    gradients are there: if they ever are, only such moments are looked at.
    """
    summed = [each for each in found if all(phase == SUMMED for phase in each.during.phases)]
    return max(min(moment.during.kept) for moment in summed or found), bool(summed)


class Outlook:
    """Bounds of choices for `job`'s model, batch and numbers on `world_size` `gpu`s of which `limit` bytes are used."""

    def __init__(self, job: Job, gpu: Gpu, limit: float, world_size: int, ranks_per_node: int, scales: Scales):
        self.job, self.gpu, self.limit, self.scales = job, gpu, limit, scales
        self.world_size, self.ranks_per_node = world_size, ranks_per_node
        self.model = job.model
        self.widest = self.model.first_k_dense_replace if self.model.n_routed_experts else 0
        self.count = sum(map(self.model.is_moe_layer, range(self.model.num_hidden_layers))) \
            if self.model.n_routed_experts else self.model.num_hidden_layers
        self._priced: dict[tuple, Priced] = {}
        self._states: dict[tuple, tuple[float, float, float]] = {}

    def job_of(self, choice: Choice) -> Job:
        """Return the job of a choice, its stages balanced."""
        return replace(self.job, settings=settings_of(self.job.settings, choice, self.world_size, self.ranks_per_node),
                       cut=None, layer_modes=None, schedule_name=None)

    def micro_batches(self, choice: Choice) -> int:
        """Return the micro-batches of a data rank in a step."""
        lane = choice.lane
        return max(1, self.job.settings.batch.global_batch_size * choice.pp * lane.tp * lane.cp
                   // (lane.micro_batch * self.world_size))

    def priced(self, lane: Lane, granularity: str, modules: tuple[str, ...]) -> Priced:
        """Return what parts of the model take on a lane."""
        key = lane, granularity, modules
        if key not in self._priced:
            self._priced[key] = self._price(Choice(lane, granularity=granularity, modules=modules))
        return self._priced[key]

    def _price(self, choice: Choice) -> Priced:
        job = self.job_of(choice)
        machine, shapes, mode = machine_of(job, self.gpu), job.shapes(), job.modes_of(0)[0]
        model, travels = self.model, choice.lane.ep > 1
        kinds = {kind: next((index for index in range(model.num_hidden_layers)
                             if model.is_moe_layer(index) == kind), None) for kind in (False, True)}
        each = {kind: layer_seconds(machine, shapes, index, mode) for kind, index in kinds.items() if index is not None}
        parts = [each[model.is_moe_layer(index)] for index in range(model.num_hidden_layers)]
        parts += [layer_seconds(machine, shapes, model.num_hidden_layers + depth, mode)
                  for depth in range(model.num_nextn_predict_layers)]
        stages = (*parts, head_seconds(job, machine))
        overlap = job.settings.communication.moe_shared_expert_overlap
        alone = Durations(stages, self.scales, overlap, False)
        here, there = (layer_bytes(shapes, self.widest, replace(mode, offloaded=each)) for each in (False, True))
        return Priced(alone.of_parts(), Durations(stages, self.scales, False, True).of_parts() if travels else (),
                      here.kept, here.backward, there.kept, 2 * machine.rates.host(there.host))

    def lane_bound(self, lane: Lane) -> float:
        """Return the least seconds of a step on a lane, whatever the pipeline."""
        priced = self.priced(lane, "", ())
        share = self.job.settings.batch.global_batch_size * lane.tp * lane.cp / (lane.micro_batch * self.world_size)
        return share * min(sum(priced.alone), sum(priced.paired) if priced.paired else float("inf"))

    def is_easy(self, choice: Choice) -> bool:
        """Return whether room makes no rank take more than its share of layers."""
        priced = self.priced(choice.lane, choice.granularity, choice.modules)
        return self._most_layers(choice, priced) == ceil(self.count / choice.pp)

    def bound(self, choice: Choice) -> float | None:
        """Return the least seconds of a step, None where not all layers find room."""
        priced = self.priced(choice.lane, choice.granularity, choice.modules)
        pairs = (choice.schedule == "DualPipeV" and choice.pp > 1 and choice.lane.ep > 1
                 and choice.lane.dispatcher != "allgather")
        parts = priced.paired if pairs else priced.alone
        layer, whole, pp = parts[self.widest], sum(parts), choice.pp
        most = self._most_layers(choice, priced)
        if most is None:
            return None
        rank = max(whole / pp, max(parts), most * layer) + choice.offloaded * choice.virtual * priced.host_seconds
        fills = _FILLS.get(choice.schedule, 0.0) * (pp - 1) * whole / pp / choice.virtual
        return self.micro_batches(choice) * rank + fills

    def _most_layers(self, choice: Choice, priced: Priced) -> int | None:
        """Return how many layers the fullest rank has at least, if no rank takes more than it has room for."""
        allocated, states, standing = self._room(choice)
        allocated -= priced.running
        pp, depth = choice.pp, max(1.0, self.count / (choice.pp * choice.virtual))
        part = min(1.0, choice.offloaded / depth)
        kept = priced.kept * (1 - part) + priced.offloaded * part
        flying = waiting_micro_batches(choice.schedule, pp, choice.virtual,
                                       enough_micro_batches(pp, self.micro_batches(choice)))
        room = sorted(int(allocated // ((states if summed else standing) + count * kept)) for count, summed in flying)
        if sum(room) < self.count:
            return None
        least = ceil(self.count / pp)
        while sum(min(each, least) for each in room) < self.count:
            least += 1
        return least

    def _room(self, choice: Choice) -> tuple[float, float, float]:
        """Return the bytes that a rank can allocate, and those of one layer's states, with and without what comes and
        goes.
        """
        key = choice.lane.tp, choice.lane.cp, choice.lane.ep, choice.lane.etp, choice.pp, choice.sharding
        if key not in self._states:
            job = self.job_of(choice)
            cut = (Stage(False, (self.widest,), (), False),) * (choice.pp * choice.virtual)
            job = replace(job, cut=cut)
            parts = state_parts(job, 0)
            nothing, much = overheads(job, 0.0).high, overheads(job, 1e9).high
            gathered = parts.gathered.all if choice.sharding == "optim_grads_params" else 0.0
            free = (self.limit - nothing) / (1 + (much - nothing) / 1e9) - gathered
            self._states[key] = (free, (parts.device - gathered) / choice.virtual,
                                 (standing_states(job, 0) - gathered) / choice.virtual)
        return self._states[key]
