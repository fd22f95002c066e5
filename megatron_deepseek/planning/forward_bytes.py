"""What a layer with routed experts has on the device while its forward runs, or runs again in its backward.

By then it has made all that it keeps of attention, of shared experts and of the router. Rows go to the experts' ranks,
are sorted by expert, and come back the same way. What was sent, gathered and received is freed once it is sorted
(parallel/expert.py and the files beside it).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes

_BEHIND = frozenset(("experts' rows", "experts: gate and up", "experts: hidden", "experts' results",
                     "results of the experts' slices", "partial sums of nodes", "input of MTP's last norm",
                     "MTP: last norm: statistics", "MTP's output"))


_NOT_LOCAL = frozenset(("MLP: gate and up", "MLP: hidden"))  # of shared experts, which have returned by then
_SECOND_HALF = "input of the MLP's norm"


@dataclass(frozen=True)
class Forward:
    """Bytes that a layer has made, what it keeps among them: when its routed experts are gathered, and at the most."""

    gathering: float
    most: float


def forward_bytes(shapes: LayerShapes, kept: Iterable[Kept]) -> Forward:
    """Return what a layer with routed experts has made of what it keeps and what is sent, moment by moment.

    `kept`: what stays of the forward, whether it is kept for the backward or the layer runs again as a whole.
    """
    sizes: dict[str, float] = {}
    for each in kept:
        sizes[each.name] = sizes.get(each.name, 0.0) + each.bytes
    before = sum(size for name, size in sizes.items() if name not in _BEHIND)
    stream = shapes.numbers.plain(shapes.stream, shapes.model.hidden_size)
    if shapes.model.n_shared_experts:
        before += stream  # their output, until it is added to that of the routed ones
    return _with_slices(shapes, before) if shapes.layout.etp > 1 else _whole_experts(shapes, before)


def unsaved_bytes(shapes: LayerShapes, whole: Sequence[Kept]) -> Forward:
    """Return what a layer with routed experts has made where what is saved goes at once: it runs again as a whole, or
    the host keeps it. Attention is over when rows are sent.
    """
    at = next(number for number, each in enumerate(whole) if each.name == _SECOND_HALF)
    attention, entered = whole[:at], [each for each in whole[:at] if each.name == "input of the layer"]
    found = forward_bytes(shapes, [*entered, *(each for each in whole[at:] if each.name not in _NOT_LOCAL)])
    return Forward(found.gathering, max(found.most, sum(each.bytes for each in attention)))


def _whole_experts(shapes: LayerShapes, before: float) -> Forward:
    """Return the bytes where each expert is whole on one rank."""
    numbers, h, layout = shapes.numbers, shapes.model.hidden_size, shapes.layout
    rows, results = _rows(shapes), numbers.plain(_rows(shapes), h)
    sorted_rows, inner = numbers.product_input(rows, h), _inner(shapes, rows)
    if layout.ep == 1:
        token = numbers.plain(shapes.own, h)
        return Forward(before + sorted_rows, before + sorted_rows + inner + results + token)
    if shapes.traffic.dispatcher == "allgather":
        tokens = numbers.plain(shapes.own * layout.ep, h)
        held = before + sorted_rows
        return Forward(held, held + inner + results + tokens + numbers.plain(shapes.own, h))
    held = before + sorted_rows
    back = max(2 * results, results + numbers.plain(_copies(shapes), h))  # sorted as they came, and sent back
    return Forward(held, held + inner + back)


def _with_slices(shapes: LayerShapes, before: float) -> Forward:
    """Return the bytes where ranks have slices of experts: each gathers the rows of all, and partial sums are reduced.
    Rows are padded to be as many on each rank: that is a copy, before as behind.
    """
    numbers, h, layout = shapes.numbers, shapes.model.hidden_size, shapes.layout
    gathered, own = _rows(shapes), _rows(shapes) / layout.etp
    held, results = before + numbers.plain(own, h), numbers.plain(gathered, h)
    run = numbers.product_input(gathered, h) + _inner(shapes, gathered) + results
    return Forward(held, held + run + results + 2 * numbers.plain(own, h))


def _copies(shapes: LayerShapes) -> float:
    return shapes.own * shapes.model.num_experts_per_tok * shapes.served


def _rows(shapes: LayerShapes) -> float:
    """Return how many rows this rank's experts get."""
    return _copies(shapes) * shapes.layout.etp * (shapes.traffic.imbalance if shapes.layout.ep > 1 else 1)


def _inner(shapes: LayerShapes, rows: float) -> float:
    """Return the bytes of gate and up, and of their product."""
    width = shapes.model.moe_intermediate_size // shapes.layout.etp
    return 2 * shapes.numbers.product_input(rows, width) + shapes.numbers.plain(rows, width)
