"""What a layer with routed experts has on the device while its forward runs, or runs again in its backward.

By then it has made all that it keeps of attention, of shared experts and of the router. Rows go to the experts' ranks,
are sorted by expert, and come back the same way. What was sent, gathered or received is freed as soon as it is sorted
(parallel/expert.py and the files beside it).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes
from megatron_deepseek.planning.trained_weights import ALL, EXPERTS_DOWN, EXPERTS_UP, Trained

_BEHIND = frozenset(("experts' rows", "experts: gate and up", "experts: hidden", "experts' results",
                     "results of the experts' slices", "partial sums of nodes", "input of MTP's last norm",
                     "MTP: last norm: statistics", "MTP's output"))


_RETURNED = frozenset(("MLP: gate and up", "MLP: hidden",  # of shared experts, when rows are sent
                       "experts' rows", "experts: gate and up", "experts: hidden"))  # when results are sent back
_SECOND_HALF = "input of the MLP's norm"


@dataclass(frozen=True)
class Forward:
    """Bytes that a layer has made, what it keeps among them: when its routed experts are gathered, at the most, and in
    its attention.
    """

    gathering: float
    most: float
    attending: float = 0.0


def forward_bytes(shapes: LayerShapes, kept: Iterable[Kept], trained: Trained = ALL) -> Forward:
    """Return what a layer with routed experts has made of what it keeps and what is sent, moment by moment.

    `kept`: what stays of the forward, whether it is kept for the backward or the layer runs again as a whole. The
    layer's input and the experts' normed one are there in any case. An adapter's result is a tensor of its own, and its
    sum with that of the weight another.
    """
    sizes: dict[str, float] = {}
    for each in kept:
        sizes[each.name] = sizes.get(each.name, 0.0) + each.bytes
    before = sum(size for name, size in sizes.items() if name not in _BEHIND)
    stream = shapes.numbers.plain(shapes.stream, shapes.model.hidden_size)
    if shapes.model.n_shared_experts:
        before += stream  # their output, until it is added to that of the routed ones
    before += stream * ("input of the layer" not in sizes and "MTP's joined input" not in sizes)
    before += stream * sizes.keys().isdisjoint(("MLP's input", "router's input"))
    before += stream * ("MTP: state's norm: statistics" in sizes and "MTP's embedding" not in sizes)
    run = _Run(before, *(sizes.get(name, 0.0) for name in ("experts' rows", "experts: gate and up", "experts: hidden")),
               *(3 if trained.adapts(name) else 1 for name in (EXPERTS_UP, EXPERTS_DOWN)))
    return _with_slices(shapes, run) if shapes.layout.etp > 1 else _whole_experts(shapes, run)


def unsaved_bytes(shapes: LayerShapes, whole: Sequence[Kept], trained: Trained = ALL) -> Forward:
    """Return what a layer with routed experts has made where what is saved goes at once: it runs again as a whole, or
    the host keeps it. Attention, which `attended_bytes` counts, is over when rows are sent.
    """
    at = next(number for number, each in enumerate(whole) if each.name == _SECOND_HALF)
    entered = [each for each in whole[:at] if each.name == "input of the layer"]
    return forward_bytes(shapes, [*entered, *(each for each in whole[at:] if each.name not in _RETURNED)], trained)


def attended_bytes(whole: Iterable[Kept]) -> float:
    """Return what a layer has made when its attention is over."""
    return sum(each.bytes for each in takewhile(lambda each: each.name != _SECOND_HALF, whole))


class _Run(NamedTuple):
    """What a layer has made before it calls experts, and what of their rows, gate and up, and hidden is kept; in how
    many tensors gate and up are, and results: with adapters in three.
    """

    before: float
    rows: float
    gate_up: float
    hidden: float
    up: int
    down: int

    @property
    def kept(self) -> float:
        """Return what experts leave behind."""
        return self.rows + self.gate_up + self.hidden

    def at_most(self, shapes: LayerShapes, rows: float) -> float:
        """Return the most that exists in experts, which get so many rows: those, gate and up, hidden, and results."""
        model, numbers, h = shapes.model, shapes.numbers, shapes.model.hidden_size
        width = model.moe_intermediate_size // shapes.layout.etp
        experts = model.n_routed_experts // shapes.layout.ep
        gate_up, results = 2 * numbers.product_input(rows, width), numbers.plain(rows, h)
        up, down = (max(count * size, (count > 1) * size + numbers.made_plain(number) + max(
            size, numbers.while_made(number, experts))) for count, size, number in (
            (self.up, gate_up, 2 * experts * h * width), (self.down, results, experts * h * width)))
        return numbers.product_input(rows, h) + max(up, gate_up + numbers.plain(rows, width) + down)


def _whole_experts(shapes: LayerShapes, run: _Run) -> Forward:
    """Return the bytes where each expert is whole on one rank."""
    numbers, h, layout, before = shapes.numbers, shapes.model.hidden_size, shapes.layout, run.before
    rows, results, token = shapes.expert_rows, numbers.plain(shapes.expert_rows, h), numbers.plain(shapes.own, h)
    sorted_rows, running = numbers.product_input(rows, h), run.at_most(shapes, rows)
    if layout.ep == 1:
        return Forward(before + sorted_rows, before + max(running, run.kept + results + token))
    if shapes.traffic.dispatcher == "allgather":
        tokens = numbers.plain(shapes.own * layout.ep, h)
        return Forward(before + sorted_rows, before + max(running, run.kept + tokens + max(results, token)))
    back = max(2 * results, results + numbers.plain(shapes.copies, h))  # sorted as they came, and sent back
    return Forward(before + sorted_rows, before + max(running, run.kept + back))


def _with_slices(shapes: LayerShapes, run: _Run) -> Forward:
    """Return the bytes where ranks have slices of experts: each gathers the rows of all, and partial sums are reduced.
    Rows are padded to be as many on each rank: that is a copy, before as behind.
    """
    numbers, h, layout = shapes.numbers, shapes.model.hidden_size, shapes.layout
    gathered, own = shapes.expert_rows, shapes.expert_rows / layout.etp
    held = run.before + numbers.plain(own, h)
    behind = run.kept + 2 * numbers.plain(gathered, h) + 2 * numbers.plain(own, h)
    return Forward(held, held + max(run.at_most(shapes, gathered), behind))
