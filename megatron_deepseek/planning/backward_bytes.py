"""What a stage's backward takes beside what stood before it, in each turn (phases.py), moment by moment.

The backward goes up through the layers. Behind it what they kept is free, and their units (stage_states.py) have come
to an end: in the first backward their sums are there, in the last one they are reduced, and the sums and gathered
weights are gone. Where weight gradients are made apart units end in W, and all at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import NamedTuple

from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.planning.backward_units import (
    largest_outside,
    of_last_mlp,
    outside_of_layers,
    units_of_layer,
    units_of_stage,
    uses_of_embedding,
)
from megatron_deepseek.planning.gathered_units import Gathered, by_layer, part_of
from megatron_deepseek.planning.held_parameters import Held
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.layer_bytes import LayerBytes
from megatron_deepseek.planning.phases import (
    BEGUN,
    FIRST,
    FREED_BY_FORWARDS,
    FREED_SUMMED,
    GATHERED,
    KEPT,
    LAST,
    MIDDLE,
    ONLY,
    REDUCED,
    SUMMED,
    Turn,
)
from megatron_deepseek.planning.replay import Piece
from megatron_deepseek.planning.stage_states import (
    NOTHING,
    Sizes,
    made_with_inputs,
    sizes,
    trained,
)
from megatron_deepseek.planning.state_bytes import Divided, data_ranks, gathered_weights
from megatron_deepseek.planning.trained_weights import trained_weights


class Instant(NamedTuple):
    """A moment of a backward. `bytes`: of activations and their gradients, less those of the kept ones that are free
    again, and of weight gradients in the layers' dtype. `done`: parameters of the units that have ended, the last one
    of them `before`. `ending`: those of a unit that ends now: `bytes` has none of its gradients, of which the last to
    be added, or copied to be reduced, is of `last` parameters. `gathered`: bytes of weights that are gathered for the
    moment, beside all that; `freed`: bytes of those of the units that have ended, this one too, where they were
    gathered for the step and this is its last backward. `piece`: how many exchanges have begun before; `waits`: the
    next one begins now.
    """

    bytes: float
    done: Held = NOTHING
    before: Held = NOTHING
    ending: Held = NOTHING
    last: float = 0.0
    gathered: float = 0.0
    freed: float = 0.0
    piece: int = 0
    waits: bool = False


@dataclass(frozen=True)
class Layers:
    """The layers of a stage, in their order, and what the backward has before it comes to them: `beside` is free of
    what the stage keeps outside of them, `waits` is what the head's weight gradient needs later, `head` its weight
    gradient, which is there until the stage's backward ends, as `embedding` is behind MTP modules, if it is another
    weight, and `loss` what is there while the head's backward runs. `given`: the gradient of the stage's output that
    was received, which is counted as such.
    """

    each: Sequence[tuple[int, LayerBytes]]
    beside: float
    waits: float
    head: float
    loss: float
    given: float
    embedding: float = 0.0

    def of_outer(self, index: int) -> float:
        """Return the bytes of gradients of weights in no layer while the backward of layer `index` runs."""
        return self.head + (self.embedding if index != self.each[-1][0] else 0.0)


def in_turn(instant: Instant, turn: tuple[int, int], size: Sizes, buffers_stay: tuple[bool, bool]) -> float:
    """Return the bytes of an instant beside what stood before the backward, if that is of the turn (before, after).

    `buffers_stay`: whether the buffer of a dense unit that was reduced stays until the next unit ends, and whether that
    of routed experts does.
    """
    before, after = turn
    done, ending = instant.done.count, instant.ending.count
    if after == SUMMED:
        if before == SUMMED:
            return instant.bytes + size.gradient * ending
        converted = size.gradient * instant.last if ending and size.gradient < size.sum else 0
        return instant.bytes + size.sum * (done + ending) + converted
    summed = size.sum if before == SUMMED else 0
    buffer = instant.before.padded
    stays = buffer.dense * buffers_stay[0] + buffer.experts * buffers_stay[1]
    found = instant.bytes - summed * done - instant.freed + size.of_reduced(instant.done)
    if ending:
        each = summed or size.gradient
        copied = max(each * ending, each * instant.last + size.of_output(instant.ending))
        return found + copied - summed * ending + size.whole * instant.ending.padded.count
    return found + size.whole * stays


def whole_backwards(job: Job, stage: int, layers: Layers) -> dict[Turn, Sequence[Piece]]:
    """Return the one piece of whole backwards in each turn, where they make weight gradients layer by layer."""
    size, stay = sizes(job), _buffers_stay(job)
    course, found = list(_highest(_course(job, stage, layers))), {}
    for turn in (FIRST, MIDDLE, LAST, ONLY):
        there = [in_turn(each, turn, size, stay) + each.gathered for each in course]
        most = max(there)
        found[Turn("B", *turn)] = [Piece(most, course[there.index(most)].gathered).rounded]
    return found


def _highest(course: Iterator[Instant]) -> Iterator[Instant]:
    """Yield the moments that can be a whole backward's peak: of those between two ends of units the highest."""
    best = next(course)
    for each in course:
        if each.ending is best.ending is NOTHING and (each.before, each.done, each.freed) == (
                best.before, best.done, best.freed):
            best = max(best, each, key=lambda moment: moment.bytes + moment.gathered)
        else:
            yield best
            best = each
    yield best


def _course(job: Job, stage: int, layers: Layers) -> Iterator[Instant]:
    """Yield the moments of a whole backward."""
    weights, upwards = by_layer(job, stage), [index for index, _ in reversed(layers.each)]
    outside = weights.outer if weights else 0.0
    if weights:
        yield Instant(0.0, gathered=outside + weights.outer_sent)
    yield Instant(layers.loss, gathered=outside + _coming(weights, upwards))
    size, done, before, free, given = sizes(job), NOTHING, NOTHING, layers.beside, layers.given
    freed = 0.0
    for (index, layer), after in zip(reversed(layers.each), [*upwards[1:], None]):
        (dense, experts), there, goes = units_of_layer(job, index), layers.of_outer(index) - free, _going(job, index)
        if weights:
            yield Instant(there, done, before, gathered=weights.beginning(index))
            yield Instant(layer.sent + there - given, done, before, gathered=weights.gathering_experts(index))
        for moment in layer.moments:
            made = size.gradient * (min(moment.dense, dense.dense) + min(moment.experts, experts.experts))
            now = Instant(moment.bytes + made + there - given * moment.given, done, before, gathered=(
                weights.at(index, after, bool(moment.ended), moment) if weights else 0.0), freed=freed)
            if moment.ends == "router":  # its own buffer is small
                before = NOTHING
            elif moment.ends:
                unit = experts if moment.ends == "experts" else dense
                last = min(unit.count, of_last_mlp(job, index)) if unit is dense else unit.count
                freed += goes.dense if unit is dense else goes.experts
                now = now._replace(ending=unit, last=last / 3, freed=freed)
                done, before = done + unit, unit
            yield now
        free, given = free + layer.kept, 0.0
    outer, part = outside_of_layers(job, stage), job.stages[stage]
    added = size.gradient * (outer.dense + _added_to_embedding(job, stage))
    yield Instant(added - free, done, before, gathered=outside, freed=freed)
    whole = gathered_weights(job, [part]).all if size.gathered else 0.0
    yield Instant(-free, done, before, outer, largest_outside(job, stage), freed=whole)


def _coming(weights: Gathered | None, upwards: Sequence[int]) -> float:
    """Return the bytes of the weights that are on their way while the backward is still outside of layers."""
    return weights.sent[upwards[0]].dense if weights and upwards else 0.0


def split_backwards(job: Job, stage: int, layers: Layers) -> dict[Turn, Sequence[Piece]]:
    """Return the pieces of backwards in each turn where weight gradients are made apart: I those of the inputs, W those
    of the weights, B both, one after the other.
    """
    size, found, weights = sizes(job), {}, by_layer(job, stage)
    course = list(_course_of_inputs(job, stage, layers, weights))
    every = weights.all if weights else 0.0
    free = layers.beside + sum(each.kept for _, each in layers.each)
    waits = layers.waits + sum(each.waiting for _, each in layers.each)
    outer = size.sum * made_with_inputs(job, stage).count

    @cache
    def inputs(first: bool, gathers: bool) -> list[Piece]:
        return _pieces(course, (GATHERED if first else SUMMED, SUMMED), size, gathers)

    @cache
    def made(first: bool, last: bool) -> float:
        return _made(job, stage, first, last, _added_to_head(job, layers))

    for before in (GATHERED, BEGUN, SUMMED, *(KEPT if weights else ())):
        first, gathers = before == GATHERED, weights is not None and before in FREED_BY_FORWARDS
        pieces, gathered = inputs(first, gathers), every * gathers
        found[Turn("I", before, max(KEPT.get(before, before), BEGUN))] = pieces
        for after in (SUMMED, REDUCED):
            of_weights = made(KEPT.get(before, before) != SUMMED, after == REDUCED)
            last = Piece(max(waits, of_weights) + outer * first + gathered - free, gathered).rounded
            found[Turn("B", before, after)] = [*pieces[:-1], max(pieces[-1], last)]
            if before != GATHERED:
                freed = FREED_SUMMED if before in KEPT and after == SUMMED else after
                found[Turn("W", before, freed)] = [Piece(of_weights - waits).rounded]
    return found


def _pieces(course: Sequence[Instant], turn: tuple[int, int], size: Sizes, gathers: bool) -> list[Piece]:
    """Return the pieces of a backward of the inputs in a turn. `gathers`: its weights are not there before it."""
    found = [Piece(-inf)] * (1 + max(each.piece for each in course))
    for each in course:
        gathered = each.gathered * gathers
        there, piece = in_turn(each, turn, size, (False, False)) + gathered, found[each.piece]
        if there > piece.most:
            piece = piece._replace(most=there, weights=gathered)
        found[each.piece] = piece._replace(left=there, weights_left=gathered) if each.waits else piece
    return [piece.rounded for piece in found]


def _course_of_inputs(job: Job, stage: int, layers: Layers, weights: Gathered | None) -> Iterator[Instant]:
    """Yield the moments of a backward of the inputs. What it gathers stays."""
    later, began, upwards = weights.outer if weights else 0.0, 0, [index for index, _ in reversed(layers.each)]
    if weights:
        yield Instant(0.0, gathered=later + weights.outer_sent)
    yield Instant(layers.loss, gathered=later + _coming(weights, upwards))
    free, waits, given = layers.beside, layers.waits, layers.given
    for (index, layer), after in zip(reversed(layers.each), [*upwards[1:], None]):
        there, behind = layers.of_outer(index) - free + waits, began + layer.gathers_behind
        if weights:
            beyond = later - weights.outer
            yield Instant(there, gathered=beyond + weights.beginning(index), piece=began)
            yield Instant(layer.sent + there - given, gathered=beyond + weights.gathering_experts(index), piece=behind)
        for moment in layer.moments:
            piece = began + moment.piece
            gathered = beyond + weights.at(index, after, piece < behind, moment) if weights else 0.0
            yield Instant(moment.bytes + there - given * moment.given, gathered=gathered, piece=piece,
                          waits=moment.waits)
        free, waits, given = free + layer.kept, waits + layer.waiting, 0.0
        began, later = began + layer.exchanges, later + (weights.layers[index].all if weights else 0.0)
    outer = made_with_inputs(job, stage)
    added = sizes(job).gradient * (outer.dense + _added_to_embedding(job, stage))
    yield Instant(added + waits - free, gathered=later, piece=began)
    yield Instant(waits - free, ending=outer, last=min(outer.dense, largest_outside(job, stage)), gathered=later,
                  piece=began)


def _added_to_embedding(job: Job, stage: int) -> int:
    """Return how many parameters' gradients there are more than weights, when the last one of the embedding is made and
    added to those of its other uses.
    """
    return 2 * trained(job, Stage(True, (), (), False)).dense if uses_of_embedding(job, stage) > 1 else 0


def _added_to_head(job: Job, layers: Layers) -> float:
    """Return the bytes beside all weight gradients when W, which comes to the head last, has made the second of several
    predictions' of the head's weight, to be added to the first: it, and what it and those that are left wait with.
    """
    predictions = 1 + job.model.num_nextn_predict_layers
    if predictions == 1 or not layers.waits or layers.head:
        return 0.0
    head = sizes(job).gradient * trained(job, Stage(False, (), (), True)).dense
    return head + layers.waits * (predictions - 1) / predictions


def _made(job: Job, stage: int, first: bool, last: bool, added: float) -> float:
    """Return the most bytes of weight gradients while W makes those of a whole stage: in the layers' dtype, `added`
    beside them, in the first W then as sums, one after the other, and behind the last W beside the buffer that is
    reduced.
    """
    size, units = sizes(job), units_of_stage(job, stage)
    number = sum(unit.count for unit in units) - made_with_inputs(job, stage).count
    most, summed = size.gradient * number + added, size.sum * number if first else 0
    if first:
        converted = units[-1].count / 3 if len(units) > 1 else largest_outside(job, stage)
        most = max(most, summed + (size.gradient * converted if size.gradient < size.sum else 0))
    if last:
        most = max(most, summed + _reducing(size, units))
    return most


def _reducing(size: Sizes, units: Sequence[Held]) -> float:
    """Return the most bytes beside a stage's weights and sums while its units are reduced, one after the other."""
    most, done = 0.0, NOTHING
    for unit in units:
        gone = size.of_reduced(done) - size.sum * done.count - size.gathered * done.padded.count
        most = max(most, gone + (size.whole - size.gathered) * unit.padded.count)
        done += unit
    return most


def _going(job: Job, index: int) -> Divided:
    """Return the bytes of the weights of a layer, gathered for the step, that the last backward frees when it has come
    to the inputs of their units, trained or not. Where such an input has no gradient they stay until all is over.
    """
    if not sizes(job).gathered:
        return Divided()
    found, made = gathered_weights(job, [part_of(job, index)], outside=False), trained_weights(job.settings, index)
    return Divided(found.dense * made.entered, found.experts * made.enters_mlp)


def _buffers_stay(job: Job) -> tuple[bool, bool]:
    """Return whether the buffer that was reduced stays until the next unit ends, beside the reduced gradients: those of
    one data rank are the buffer itself, but for those that go to the host.
    """
    dense, experts = data_ranks(job)
    host = job.settings.offload.optimizer_cpu_offload
    return dense > 1 or host, experts > 1 or host
