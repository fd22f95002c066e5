"""Search the layout that trains fastest: meshes, schedule, dispatcher, stages, recomputation and offloading together.

Best first: every lane and every choice has a bound that it cannot be faster than (outlook.py), and the one with the
least bound is looked at next. Looking at a choice means to cut its stages by the exact program of partition.py, so that
all ranks fit, and to simulate the step. The search ends when there are ten and no bound is below the best step, or 150
more were looked at and none was better. What recomputes or
offloads more comes up only where less does not fit, so stages, recomputation and offloading are decided together. Last,
the cuts of the best are moved by single layers for as long as the simulation gets faster.

Nothing depends on the clock or on chance: every rank of a job that searches finds the same.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_deepseek.parallel.layout_string import to_short_string
from megatron_deepseek.planning.candidates import (
    SHARDINGS,
    Choice,
    Lane,
    lanes,
    offloads,
    options,
    pipelines,
    recomputes,
)
from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import RankMemory, all_ranks, worst
from megatron_deepseek.planning.outlook import Outlook
from megatron_deepseek.planning.partition import Bounds, partition
from megatron_deepseek.planning.pipeline_balance import stage_of
from megatron_deepseek.planning.rank_costs import RankCosts, enough_micro_batches
from megatron_deepseek.planning.stage_time import Scales, machine_of
from megatron_deepseek.planning.step_time import StepTime, step_time
from megatron_deepseek.settings import Settings

Accept = Callable[[Mapping[str, Any]], Settings]  # values of arguments; raises ValueError for what is refused
BEST, PATIENCE = 10, 150
_MOVED = 3  # of the best, whose cuts are moved at last
_SIMULATED = 3  # rounds of micro-batches that are simulated of a long step, and one more for its pace
_OF_MEMORY = ("cpu_offloading_num_layers", "recompute_granularity", "recompute_modules",
              "data_parallel_sharding_strategy")


@dataclass(frozen=True)
class Plan:
    """A layout that fits: the values of its arguments, and the step that it takes."""

    values: Mapping[str, Any]
    choice: Choice
    step: StepTime
    memory: list[RankMemory]


@dataclass(frozen=True)
class Found:
    """The best layouts, the fastest first; how many lanes there were, and choices were looked at. Where nothing fits,
    `closest` needs least.
    """

    plans: list[Plan]
    lanes: int
    looked_at: int
    closest: tuple[Choice, Job, RankMemory] | None = None


@dataclass(frozen=True)
class Draft:
    """A choice with its cut, and the seconds of its step."""

    seconds: float
    choice: Choice
    job: Job

    def __lt__(self, other: "Draft") -> bool:
        return (self.seconds, self.choice) < (other.seconds, other.choice)


class Search:
    """`job` says what stays: model, batch, numbers, engine. `accept` makes settings of arguments or refuses them;
    `fixed` has values that the user gave. `per_node`: ranks that fast links join.
    """

    def __init__(self, job: Job, gpu: Gpu, limit: float, world_size: int, accept: Accept,
                 fixed: Mapping[str, Any] | None = None, scales: Scales = Scales(), per_node: int | None = None):
        self.job, self.gpu, self.limit, self.accept, self.scales = job, gpu, limit, accept, scales
        self.world_size, self.fixed = world_size, dict(fixed or {})
        self.per_node = per_node or min(gpu.scale_up_gpus, world_size)
        self.outlook = Outlook(job, gpu, limit, world_size, self.per_node, scales)
        self.model, self.batch = job.model, job.settings.batch.global_batch_size
        self.ways = sorted(((*each, sharding) for each in recomputes(self.model) for sharding in SHARDINGS),
                           key=self._cost_of_way)
        self.looked_at, self.refused, self.best = 0, False, float("inf")

    def _cost_of_way(self, way: tuple[str, tuple[str, ...], str]) -> tuple:
        """Return by what ways to make room are ordered: the seconds of a step without a pipeline, then sharding."""
        granularity, modules, sharding = way
        return sum(self.outlook.priced(Lane(), granularity, modules).alone), SHARDINGS.index(sharding)

    def run(self) -> Found:
        """Return the best layouts."""
        heap, lanes_ = [], 0
        for lane in lanes(self.model, self.world_size, self.job.settings.data.seq_length):
            try:
                if self._is_open(Choice(lane), ("pipeline_schedule", "pipeline_model_parallel_size")):
                    heap.append((self.outlook.lane_bound(lane), 0, lane))
                    lanes_ += 1
            except ValueError:  # sizes that do not divide the model's
                continue
        heapq.heapify(heap)
        best: list[Draft] = []
        patient = PATIENCE
        while heap and (len(best) < BEST or (heap[0][0] < best[0].seconds and self.looked_at < patient)):
            _, _, item = heapq.heappop(heap)
            if isinstance(item, Lane):
                for bound, choice in self._choices(item):
                    heapq.heappush(heap, (bound, 1, choice))
                continue
            draft = self.look_at(item)
            if draft is not None:
                best = sorted([*best, draft])[:BEST]
                patient = self.looked_at + PATIENCE if best[0] is draft else patient
                self.best = best[-1].seconds if len(best) == BEST else self.best
            elif not self.refused:
                for bound, choice in self._more_room(item):
                    heapq.heappush(heap, (bound, 1, choice))
        best = sorted(map(self.moved, best[:_MOVED])) + best[_MOVED:]
        plans = sorted(map(self.plan, best), key=lambda plan: plan.step.step_seconds)
        return Found(plans, lanes_, self.looked_at, None if plans else self._closest())

    def _is_open(self, choice: Choice, without: tuple[str, ...] = ()) -> bool:
        """Return whether a choice has the values that the user gave."""
        if not self.fixed:
            return True
        values = options(choice, self.model, self.per_node)
        return all(values[name] == value for name, value in self.fixed.items()
                   if name in values and name not in without)

    def _choices(self, lane: Lane) -> Iterator[tuple[float, Choice]]:
        """Yield (bound, choice) of a lane's pipelines, each with the least that makes room, and what is between."""
        for pp, virtual, schedule in pipelines(self.model, lane, self.world_size, self.batch):
            most = Choice(lane, pp, virtual, schedule, SHARDINGS[1], "full",
                          offloaded=-(-self.model.num_hidden_layers // (pp * virtual)))
            if self._is_open(Choice(lane, pp, virtual, schedule), _OF_MEMORY) and self.outlook.bound(most) is not None:
                yield from self._making_room(Choice(lane, pp, virtual, schedule), -1)

    def _making_room(self, choice: Choice, after: int) -> Iterator[tuple[float, Choice]]:
        """Yield (bound, choice) of the ways to make room behind number `after`, by what they cost, up to the first with
        which room does not matter any more.
        """
        for way in range(after + 1, len(self.ways)):
            granularity, modules, sharding = self.ways[way]
            each = replace(choice, granularity=granularity, modules=modules, sharding=sharding, offloaded=0)
            if not self._is_open(each, ("cpu_offloading_num_layers",)):
                continue
            found = self._least_offloaded(each, -1)
            if found is not None:
                yield found
                if found[1].offloaded == 0 and self.outlook.is_easy(each):
                    return

    def _least_offloaded(self, choice: Choice, above: int) -> tuple[float, Choice] | None:
        """Return the bound with the fewest offloaded layers, more than `above`, that make room, by halving."""
        layers = -(-self.model.num_hidden_layers // (choice.pp * choice.virtual))
        counts = [count for count in offloads(layers)
                  if count > above and self.fixed.get("cpu_offloading_num_layers", count) == count]
        if not counts:
            return None
        low, high = 0, len(counts) - 1
        found = self.outlook.bound(replace(choice, offloaded=counts[high]))
        if found is None:
            return None
        while low < high:
            middle = (low + high) // 2
            bound = self.outlook.bound(replace(choice, offloaded=counts[middle]))
            if bound is None:
                low = middle + 1
            else:
                high, found = middle, bound
        return found, replace(choice, offloaded=counts[high])

    def _more_room(self, choice: Choice) -> Iterator[tuple[float, Choice]]:
        """Yield what comes up where a choice did not fit: one more layer offloaded, and the ways that cost more."""
        found = self._least_offloaded(choice, choice.offloaded)
        if found is not None:
            yield found
        if choice.offloaded == 0 and self.outlook.is_easy(choice):
            way = self.ways.index((choice.granularity, choice.modules, choice.sharding))
            yield from self._making_room(choice, way)

    def look_at(self, choice: Choice) -> Draft | None:
        """Return a choice's best cut and its seconds, None where it is refused or nothing fits."""
        self.looked_at, self.refused = self.looked_at + 1, False
        try:
            settings = self.accept(options(choice, self.model, self.per_node))
        except ValueError:
            self.refused = True
            return None
        job = replace(self.job, settings=settings, cut=None, layer_modes=None, schedule_name=None)
        costs = RankCosts(job, machine_of(job, self.gpu), self.limit, choice.virtual, self.scales)
        if costs.parts < choice.pp * choice.virtual:
            return None
        bounds = partition(costs.pipeline(self.best / job.micro_batches))
        return None if bounds is None else self._draft(choice, job, bounds)

    def _draft(self, choice: Choice, job: Job, bounds: tuple[Bounds, ...]) -> Draft:
        cut = replace(job, cut=tuple(stage_of(self.model, *each) for each in bounds))
        return Draft(self.seconds(cut), choice, cut)

    def seconds(self, job: Job) -> float:
        """Return the seconds of a step. Of a long one the beginning is simulated, and the rest goes on at its pace."""
        pp, count = job.layout.pp, job.micro_batches
        few = enough_micro_batches(pp, count, _SIMULATED)
        if few == count:
            return step_time(job, self.gpu, self.scales).step_seconds
        one, two = (step_time(_with_micro_batches(job, each), self.gpu, self.scales).step_seconds
                    for each in (few, few + pp))
        return two + (count - few - pp) * (two - one) / pp

    def moved(self, draft: Draft) -> Draft:
        """Return a draft whose step gets no faster if one part moves to a neighbouring stage."""
        job = draft.job
        costs = RankCosts(job, machine_of(job, self.gpu), self.limit, draft.choice.virtual, self.scales)
        bounds, faster = bounds_of(job, costs.parts), True
        while faster and job.layout.pp > 1:
            faster = False
            for place in range(1, len(bounds)):
                for step in (-1, 1):
                    each = _with_edge(bounds, place, bounds[place][0] + step)
                    if each is None or not _all_fit(costs, job, each):
                        continue
                    other = self._draft(draft.choice, job, each)
                    if other.seconds < draft.seconds * (1 - 1e-6):
                        draft, bounds, faster = other, each, True
        return draft

    def plan(self, draft: Draft) -> Plan:
        """Return a draft as arguments with its whole step and memory."""
        layout = to_short_string(draft.job.stages) if draft.choice.pp > 1 else None
        values = options(draft.choice, self.model, self.per_node, layout)
        job = replace(draft.job, settings=self.accept(values), cut=None)
        return Plan(values, draft.choice, step_time(job, self.gpu, self.scales), all_ranks(job))

    def _closest(self) -> tuple[Choice, Job, RankMemory] | None:
        """Return what needs least of all that recomputes and offloads as much as can be."""
        best = None
        for lane in lanes(self.model, self.world_size, self.job.settings.data.seq_length):
            if lane.micro_batch > 1 or lane.dispatcher != "alltoall":
                continue
            for pp, virtual, schedule in pipelines(self.model, lane, self.world_size, self.batch):
                if virtual > 2 or schedule not in ("1F1B", "DualPipeV"):
                    continue
                layers = -(-self.model.num_hidden_layers // (pp * virtual))
                choice = Choice(lane, pp, virtual, schedule, SHARDINGS[1], "full", (), layers)
                try:
                    job = replace(self.job, settings=self.accept(options(choice, self.model, self.per_node)), cut=None)
                except ValueError:
                    continue
                if self._is_open(choice):
                    needs = worst(all_ranks(job))
                    if best is None or needs.high < best[2].high:
                        best = choice, job, needs
        return best


def _with_micro_batches(job: Job, count: int) -> Job:
    batch = job.settings.batch
    size = count * batch.micro_batch_size * job.layout.dp
    return replace(job, settings=replace(job.settings, batch=replace(batch, global_batch_size=size)))


def bounds_of(job: Job, parts: int) -> tuple[Bounds, ...]:
    """Return the bounds of a job's stages in parts of the model."""
    ends, last = [], 0
    for stage in job.stages:
        last += len(stage.layers) + len(stage.mtp) + stage.loss
        ends.append(last)
    assert last == parts, (last, parts)
    return tuple(zip((0, *ends), ends))


def _with_edge(bounds: tuple[Bounds, ...], place: int, edge: int) -> tuple[Bounds, ...] | None:
    """Return bounds where stage `place` begins at `edge`, None where a stage would be empty."""
    before, here = (bounds[place - 1][0], edge), (edge, bounds[place][1])
    if before[0] >= before[1] or here[0] >= here[1]:
        return None
    return (*bounds[:place - 1], before, here, *bounds[place + 1:])


def _all_fit(costs: RankCosts, job: Job, bounds: tuple[Bounds, ...]) -> bool:
    return all(costs.fits(rank, tuple(bounds[stage] for stage in job.held(rank))) for rank in range(job.layout.pp))
