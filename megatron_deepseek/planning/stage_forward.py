"""What a stage's forward takes beside what it keeps, in each turn (phases.py), moment by moment.

The forward goes down through the layers. What a layer needs for a moment is there together with what the layers before
it keep, and not with what those behind it will. Weights that are gathered by the layer are freed behind it. Where
another run takes turns with it (replay.py), each exchange of rows ends a piece.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_deepseek.planning.gathered_units import Gathered, by_layer
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.layer_bytes import LayerBytes
from megatron_deepseek.planning.phases import BEFORE, BEGUN, FREED, FREED_BY_FORWARDS, GATHERED, SUMMED, Turn
from megatron_deepseek.planning.replay import Piece
from megatron_deepseek.planning.stage_states import gathers_ahead, passing
from megatron_deepseek.planning.state_bytes import Divided


class _Instant(NamedTuple):
    """A moment of a forward. `bytes`: of activations, less those that are kept and not made yet. `gathered`: weights
    that are there if none were before, `freed`: those that are gone if all were. `piece` and `waits` as a backward's.
    """

    bytes: float
    gathered: float = 0.0
    freed: float = 0.0
    piece: int = 0
    waits: bool = False


def forwards(job: Job, stage: int, layers: Sequence[tuple[int, LayerBytes]], beside: float, head: float
             ) -> dict[Turn, Sequence[Piece]]:
    """Return the pieces of a stage's forwards in each turn. `layers`: with their ids, in their order; `beside` is kept
    outside of them; `head` is there while the loss is made.
    """
    weights = by_layer(job, stage)
    course = list(_course(job, layers, beside, head, weights))
    turns = [(BEFORE, GATHERED), *((phase, phase) for phase in (GATHERED, BEGUN, SUMMED))]
    if job.regathers:
        turns = [(BEFORE, GATHERED), (GATHERED, GATHERED),
                 *(turn for phase, freed in FREED.items() for turn in ((phase, freed), (freed, freed)))]
    come = passing(job, stage, GATHERED).all - passing(job, stage, BEFORE).all
    found = {Turn("F", before, after): _pieces(course, job, before, come if before == BEFORE else 0.0)
             for before, after in turns}
    if weights and not job.splits_backwards:
        behind = list(_course(job, layers, beside, head, weights, _left_by_backwards(weights)))
        found[Turn("F", SUMMED, SUMMED)] = _pieces(behind, job, SUMMED, 0.0)
    if weights and gathers_ahead(job):  # all of them before the first forward, which frees them layer by layer
        whole = [each._replace(gathered=weights.all - each.freed) for each in course]
        found[Turn("F", BEFORE, GATHERED)] = _pieces(whole, job, BEFORE, come)
    return found


def _left_by_backwards(weights: Gathered) -> float:
    """Return the bytes that a backward has left of what it has gathered: behind its last unit torch gathers the one
    that was over before it in all forwards so far, the last one of the forward before, which is the stage's own if it
    has weights outside of layers, and else its last layer's. The next forward uses it.
    """
    return weights.sent[max(weights.sent)].dense if weights.sent and not weights.outer else 0.0


def _pieces(course: Sequence[_Instant], job: Job, before: int, grown: float) -> list[Piece]:
    """Return the pieces of a forward from the phase `before` on. `grown`: by so much more stands behind it."""
    found = [Piece(-float("inf"))] * (1 + max(each.piece for each in course))
    gathers = job.freed_by_forwards and (not job.regathers or before in (BEFORE, *FREED_BY_FORWARDS))
    for each in course:
        weights = each.gathered if gathers else -each.freed
        there, piece = each.bytes + weights + grown, found[each.piece]
        if there > piece.most:
            piece = piece._replace(most=there, weights=weights)
        found[each.piece] = piece._replace(left=there, weights_left=weights + grown) if each.waits else piece
    return [piece.rounded for piece in found]


def _course(job: Job, layers: Sequence[tuple[int, LayerBytes]], beside: float, head: float, weights: Gathered | None,
            ahead: float = 0.0) -> Iterator[_Instant]:
    """Yield the moments of a forward. `ahead`: bytes of the last layer's weights that are there before it."""
    exchanges, began, freed = job.exchanges, 0, 0.0
    behind, outer = beside + sum(each.kept for _, each in layers), weights.outer if weights else 0.0
    before = None
    if weights:
        yield _Instant(-behind, outer + weights.outer_sent)
    for index, layer in layers:
        early = ahead if index != layers[-1][0] else 0.0
        if weights:
            yield _Instant(-behind, early + weights.entering(index, before), freed, began)
        behind, before = behind - layer.kept, index
        own, moe = weights.layers[index] if weights else Divided(), job.model.is_moe_layer(index)
        left = weights.left(index) if weights else 0.0
        if moe:
            yield _Instant(layer.attending - behind, early + weights.attending(index) if weights else 0.0, freed, began)
            for _ in range(exchanges.out):
                yield _Instant(layer.gathering - behind, outer + own.dense, freed, began, True)
                began += 1
            if weights:
                yield _Instant(layer.gathering - behind, early + weights.gathering_experts(index), freed, began)
        yield _Instant(layer.forward - behind, early + weights.forward(index) if weights else 0.0, freed, began)
        for _ in range(exchanges.back if moe else 0):
            yield _Instant(layer.forward - behind, outer + own.dense + left, freed + own.experts, began, True)
            began += 1
        freed += own.all
    left = weights.left(before) if weights else 0.0
    yield _Instant(head, outer + left, freed, began)
    yield _Instant(0.0, outer + left, freed + outer, began)
