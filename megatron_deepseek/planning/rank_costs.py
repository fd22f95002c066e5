"""Seconds and bytes of pipeline ranks for any cut of a model: what a search asks thousands of times.

All of it is what memory.py and stage_time.py say of a Job with that cut; stages that hold the same are asked for once.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import ceil

from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.planning.actions import Run, actions, held_stages
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.layer_time import Machine, Seconds
from megatron_deepseek.planning.overheads import overheads
from megatron_deepseek.planning.partition import Bounds, Pipeline
from megatron_deepseek.planning.pipeline_balance import stage_of
from megatron_deepseek.planning.replay import Moment, StageBytes, moments
from megatron_deepseek.planning.stage_bytes import arrived_in_acts, stage_bytes
from megatron_deepseek.planning.stage_time import Durations, Scales, durations, stage_seconds
from megatron_deepseek.planning.state_bytes import standing_states

NOTHING = Stage(False, (), (), False)
_LONG = 4  # rounds of micro-batches after which nothing new happens on a rank


def enough_micro_batches(pp: int, micro_batches: int, rounds: int = _LONG) -> int:
    """Return a number of micro-batches, as few as a rank's list needs to show all that happens in it."""
    return rounds * pp if micro_batches > rounds * pp and micro_batches % pp == 0 else micro_batches


@lru_cache(4096)
def worst_moments(schedule: str, pp: int, virtual: int, micro_batches: int, rank: int, early: bool = True,
                  regathers: bool = False) -> tuple[Moment, ...]:
    """Return the moments of a rank that can be its peak: of those with the same runs and phases the ones that no other
    one is above in every count. `early`: receives are started as torch's schedules start them; `regathers`: Job's.
    """
    held = held_stages(schedule, pp, virtual, rank)
    acts = actions(schedule, pp, virtual, micro_batches, rank)
    found = moments(acts, held, arrived_in_acts(schedule, pp, virtual, micro_batches, rank, early), regathers)
    distinct = {(_running(each), each.during.counts): each for each in found}
    best: dict[tuple, list[Moment]] = {}
    for each in sorted(distinct.values(), key=lambda moment: -sum(moment.during.counts)):
        rivals = best.setdefault(_running(each), [])
        if not any(all(a >= b for a, b in zip(other.during.counts, each.during.counts)) for other in rivals):
            rivals.append(each)
    return tuple(moment for group in best.values() for moment in group)


def _running(moment: Moment) -> tuple:
    return moment.runs, moment.during.phases


@dataclass(frozen=True)
class Kind:
    """What a stage is, as far as its costs are concerned."""

    first: bool
    dense: int
    experts: int
    mtp_before: int
    mtp: int
    norm: bool
    last: bool


class RankCosts:
    """`job`'s layout, schedule and modes, whatever its cut; `limit` is what a GPU may hold."""

    def __init__(self, job: Job, machine: Machine, limit: float, virtual: int, scales: Scales = Scales()):
        self.job, self.machine, self.limit, self.virtual, self.scales = job, machine, limit, virtual, scales
        self.model, self.pp = job.model, job.layout.pp
        self.shapes = job.shapes()
        self._stages: dict[Kind, tuple[Seconds, StageBytes]] = {}
        self._states: dict[tuple, float] = {}
        self._seconds: dict[tuple, float] = {}
        self._fits: dict[tuple, bool] = {}
        nothing, much = overheads(job, 0.0).high, overheads(job, 1e9).high
        self._beyond = nothing, (much - nothing) / 1e9

    @property
    def parts(self) -> int:
        """Return the number of parts of the model: layers, MTP modules and the head."""
        return self.model.num_hidden_layers + self.model.num_nextn_predict_layers + 1

    def kind(self, bounds: Bounds) -> Kind:
        """Return the kind of the stage of these parts."""
        stage = stage_of(self.model, *bounds)
        experts = sum(map(self.model.is_moe_layer, stage.layers))
        before = max(0, min(bounds[0], self.parts - 1) - self.model.num_hidden_layers)
        return Kind(bounds[0] == 0, len(stage.layers) - experts, experts, before, len(stage.mtp),
                    self.model.num_hidden_layers - 1 in stage.layers, stage.loss)

    def stage(self, bounds: Bounds) -> tuple[Seconds, StageBytes]:
        """Return the seconds and bytes of one micro-batch on a stage."""
        kind = self.kind(bounds)
        if kind not in self._stages:
            ends = [(0, bounds[0])] * (bounds[0] > 0) + [bounds] + [(bounds[1], self.parts)] * (bounds[1] < self.parts)
            job = replace(self.job, cut=tuple(stage_of(self.model, *each) for each in ends))
            at = int(bounds[0] > 0)
            self._stages[kind] = (stage_seconds(job, self.machine, at), stage_bytes(job, at, self.shapes).replayed)
        return self._stages[kind]

    def standing(self, rank: int, bounds: tuple[Bounds, ...]) -> float:
        """Return the bytes of the states that a rank has all the time."""
        place = 0 if rank == 0 else self.pp - 1 if rank == self.pp - 1 else 1
        kinds = tuple(map(self.kind, bounds))
        if (place, kinds) not in self._states:
            held = held_stages(self.job.schedule, self.pp, self.virtual, place)
            self._states[place, kinds] = standing_states(self._with(held, bounds), place)
        return self._states[place, kinds]

    def _with(self, held: list[int], bounds: tuple[Bounds, ...]) -> Job:
        """Return the job with the stages `held` cut so, and nothing in the others but the MTP modules before these."""
        cut = [NOTHING] * (self.pp * self.virtual)
        for stage, each in zip(held, bounds):
            before = self.kind(each).mtp_before
            if stage and before:
                cut[stage - 1] = Stage(False, (), tuple(range(before)), False)
            cut[stage] = stage_of(self.model, *each)
        return replace(self.job, cut=tuple(cut))

    def peak(self, rank: int, bounds: tuple[Bounds, ...]) -> float:
        """Return the most that a rank allocates."""
        sizes = [self.stage(each)[1] for each in bounds]
        found = worst_moments(self.job.schedule, self.pp, self.virtual,
                              enough_micro_batches(self.pp, self.job.micro_batches), rank,
                              self.job.engine.receives_early, self.job.regathers)
        running, at_once = {}, self.job.pairs_at_once
        for moment in found:
            if moment.runs not in running:
                running[moment.runs] = moment.running(sizes, at_once)[0]
        return self.standing(rank, bounds) + max(
            sum(moment.during.bytes(sizes)) + running[moment.runs] for moment in found)

    def needed(self, allocated: float) -> float:
        """Return what a GPU may need where so much is allocated."""
        return self._beyond[0] + (1 + self._beyond[1]) * allocated

    def fits(self, rank: int, bounds: tuple[Bounds, ...]) -> bool:
        """Return whether a rank has room for the stages `bounds`."""
        key = rank, tuple(map(self.kind, bounds))
        if key not in self._fits:
            self._fits[key] = self.needed(self.peak(rank, bounds)) <= self.limit
        return self._fits[key]

    @cached_property
    def _rules(self) -> Durations:
        """Return how this job's acts overlap."""
        return durations(replace(self.job, cut=(NOTHING,) * self.pp), self.machine, self.scales)

    def seconds(self, rank: int, bounds: tuple[Bounds, ...]) -> float:
        """Return a rank's seconds for one micro-batch: a forward and a backward of each of its stages, in pairs where
        the schedule has them.
        """
        key = tuple(map(self.kind, bounds))
        if key not in self._seconds:
            made = replace(self._rules, stages=tuple(self.stage(each)[0] for each in bounds))
            count = len(bounds)
            if made.pairs_overlap and count == 2:
                self._seconds[key] = sum(made.act((Run("F", at, 0), Run("B", 1 - at, 0))) for at in range(2))
            else:
                self._seconds[key] = sum(each["F"] + each["B"] for each in made.of_stage)
        return self._seconds[key]

    @cached_property
    def part_seconds(self) -> tuple[float, ...]:
        """Return for each part of the model the least that it adds to its rank's seconds."""
        every = tuple(self.stage((part, part + 1))[0] for part in range(self.parts))
        pairs = self._rules.pairs_overlap and self.virtual == 2
        return replace(self._rules, stages=every, pairs_overlap=pairs).of_parts()

    def pipeline(self, most: float = float("inf")) -> Pipeline:
        """Return what `partition` cuts, if no rank may take more than `most` seconds for a micro-batch. Of equal layers
        one rank has at least its share, rounded up.
        """
        parts, layers = self.part_seconds, self.model.num_hidden_layers
        usual = Counter(parts[:layers]).most_common(1)[0]
        least = max(sum(parts) / self.pp, max(parts), ceil(usual[1] / self.pp) * usual[0])
        flags = tuple(part == usual[0] and at < layers for at, part in enumerate(parts))
        most_layers = int(min(most, 1.4 * least) / usual[0]) + 1
        room = tuple(self._room(rank, flags, most_layers) for rank in range(self.pp)) if self.virtual < 3 else ()
        return Pipeline(parts, self.pp, self.virtual, self.job.schedule, self.seconds, self.fits, least, most, flags,
                        room)

    def _room(self, rank: int, usual: tuple[bool, ...], most: int) -> int:
        """Return how many usual layers a rank has room for, `most` at most. They are taken from inside the model."""
        inside = sum(usual) - 1
        first = usual.index(True) + (self.pp > 1)
        for count in range(2, most + 1):
            if count > inside:
                return most
            ways = [((first, first + count),)] if self.virtual == 1 else [
                ((first, first + one), (first + one, first + count)) for one in range(1, count)]
            if not any(self.fits(rank, each) for each in ways):
                return count - 1
        return most
