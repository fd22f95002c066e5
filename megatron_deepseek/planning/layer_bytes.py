"""What one layer takes on the device and the host, by how it is run: kept, partly or wholly recomputed, offloaded.

A search chooses a mode for every layer; the arguments of a run give one to all layers of a stage alike, and offload the
first ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_deepseek.planning.activations import layer, mtp, remaining, total
from megatron_deepseek.planning.adapter_inputs import seen_by_adapters
from megatron_deepseek.planning.attention_forward import attention_forward
from megatron_deepseek.planning.backward_tape import layer_moments
from megatron_deepseek.planning.byte_tape import Backward
from megatron_deepseek.planning.forward_bytes import Forward, attended_bytes, forward_bytes, unsaved_bytes
from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes
from megatron_deepseek.planning.trained_weights import ALL, Trained, kept_where
from megatron_deepseek.planning.waiting_bytes import inner_bytes, waiting_bytes
from megatron_deepseek.settings import OffloadSettings, RecomputeSettings


@dataclass(frozen=True)
class LayerMode:
    """`full`: only the layer's inputs are kept, and it runs again in the backward. `again`: modules of
    --recompute-modules whose outputs are made again. `offloaded`: what is kept waits in the host's memory.
    """

    full: bool = False
    again: tuple[str, ...] = ()
    offloaded: bool = False


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of a micro-batch. `kept` on the device and `host` in the host's memory from forward to backward; `forward`
    exists only while the layer runs, `attending` while its attention does, less all that it will keep; `moments` are
    those of its backward; `waiting` is what its weight gradients need where a schedule makes them later; `sent` is what
    has been made of the backward when routed experts are gathered, behind `gathers_behind` exchanges, and `gathering`
    what there is of the forward then, less all that it will keep.
    """

    kept: float
    host: float
    forward: float
    moments: tuple[Backward, ...]
    waiting: float
    sent: float
    gathering: float = 0.0
    gathers_behind: int = 0
    attending: float = 0.0

    @property
    def exchanges(self) -> int:
        """Return how many exchanges a backward begins."""
        return max(each.piece for each in self.moments)

    @property
    def backward(self) -> float:
        """Return the most that exists beside what is kept while the backward runs."""
        return max(each.bytes for each in self.moments)


def modes(recompute: RecomputeSettings, offload: OffloadSettings, count: int) -> tuple[LayerMode, ...]:
    """Return the mode of each of the `count` layers of a stage, as model/layer.py's `choose_run` gives them."""
    full = recompute.granularity == "full"
    again = tuple(recompute.modules) if recompute.granularity == "selective" else ()
    return tuple(LayerMode(full, again, position < offload.cpu_offloading_num_layers) for position in range(count))


@lru_cache(4096)
def layer_bytes(shapes: LayerShapes, index: int, mode: LayerMode, deferred: bool = False, trained: Trained = ALL
                ) -> LayerBytes:
    """Return what layer `index` takes; ids from num_hidden_layers on are MTP modules. Equal layers are counted once.
    `deferred`: a schedule makes weight gradients apart. `trained`: which of its weights are trained.
    """
    return _of_kind(shapes, _representative(shapes, index), mode, deferred, trained)


def _representative(shapes: LayerShapes, index: int) -> int:
    """Return the first layer that is like layer `index`."""
    model = shapes.model
    if index >= model.num_hidden_layers:
        return index
    kind = model.is_moe_layer(index), model.window_of(index)
    return next(other for other in range(model.num_hidden_layers)
                if (model.is_moe_layer(other), model.window_of(other)) == kind)


_READ_BEFORE_EXPERTS = ("partial sums of nodes", "experts' results")  # by a backward, and then free


@lru_cache(1024)
def _of_kind(shapes: LayerShapes, index: int, mode: LayerMode, deferred: bool, trained: Trained) -> LayerBytes:
    depth = index - shapes.model.num_hidden_layers
    all_kept = tuple(mtp(shapes, depth) if depth >= 0 else layer(shapes, index))
    whole = kept_where(trained, all_kept, shapes.own * shapes.model.hidden_size * shapes.numbers.wide)
    if trained.adapted and shapes.numbers.fp8:
        whole = tuple(seen_by_adapters(shapes, whole, trained))
    if trained.adapted:
        whole += (Kept("what adapters' A make", inner_bytes(shapes, index, trained)),)
    waiting = waiting_bytes(shapes, index, remaining(whole, ()), trained)
    held = inputs(shapes, all_kept) if mode.full and trained.runs_back else list(remaining(whole, mode.again))
    stays = [each for each in held if each.name == "MTP's output" or each.stays and not mode.full]
    kept, here = _sum(held), _sum(stays if mode.offloaded else held)
    made = _made_at_all(whole, mode)
    made += tuple(each for each in held if each not in made)  # what is given to a layer that runs again
    moe = shapes.model.is_moe_layer(index)
    again = None if not mode.full else forward_bytes(shapes, whole, trained) if moe else Forward(0.0, _sum(whole))
    if again:
        again = replace(again, attending=attention_forward(shapes, index, whole, trained))
    moments = layer_moments(shapes, index, made, stays if mode.offloaded else held, deferred, again, trained)
    read = _sum(each for each in held if each.name in _READ_BEFORE_EXPERTS) if not mode.offloaded else 0.0
    sent = _stream(shapes) + (again.gathering - here if again else _sent_back(shapes) - read) if moe else 0.0
    host = kept - here + _offloaded_too(shapes, depth, mode) if mode.offloaded else 0.0
    unsaved = mode.full or mode.offloaded
    attending = attention_forward(shapes, index, all_kept if unsaved else held, trained) - here
    if unsaved and moe:
        attending = max(attending, attended_bytes(all_kept) - here)
    if moe:
        first = unsaved_bytes(shapes, all_kept, trained) if unsaved else forward_bytes(shapes, held, trained)
        forward, gathering = max(0.0, first.most - here), first.gathering - here
        behind = shapes.traffic.exchanges.out if mode.full else shapes.traffic.exchanges.to_experts
    else:
        gathering, behind = 0.0, 0
        beyond = host if mode.offloaded else total(whole) - kept if mode.full else 0.0
        forward = max(buffers(shapes) + beyond, attending, beyond + _leaving_mlp(shapes))
    return LayerBytes(here, host, forward, moments, waiting, sent, gathering, behind, attending)


def _leaving_mlp(shapes: LayerShapes) -> float:
    """Return the bytes while a dense MLP's hidden state is multiplied with a weight that is made plain, beside what an
    adapter has given; 0 for a plain weight.
    """
    model, numbers = shapes.model, shapes.numbers
    number, given = model.intermediate_size // shapes.layout.tp * model.hidden_size, numbers.plain(
        shapes.whole, model.hidden_size)
    made = numbers.made_plain(number)
    return given + made + max(given, numbers.while_made(number)) if made else 0.0


def _sum(kept: Iterable[Kept]) -> float:
    return sum(each.bytes for each in kept)


def _stream(shapes: LayerShapes) -> float:
    return shapes.numbers.plain(shapes.stream, shapes.model.hidden_size)


def _sent_back(shapes: LayerShapes) -> float:
    """Return the bytes of gradients on their way to the experts."""
    return shapes.numbers.plain(shapes.expert_rows, shapes.model.hidden_size)


def _made_at_all(whole: Iterable[Kept], mode: LayerMode) -> tuple[Kept, ...]:
    """Return what a layer keeps or makes again."""
    return tuple(each for each in whole if each.for_again in (None, *mode.again))


def _offloaded_too(shapes: LayerShapes, depth: int, mode: LayerMode) -> float:
    """Return what goes to the host beside what a layer keeps: MTP's first state, and each layer's rotary table."""
    state = shapes.numbers.plain(shapes.stream, shapes.model.hidden_size) if depth >= 0 else 0.0
    return state + (0 if mode.full else 4 * shapes.length // shapes.layout.cp * shapes.model.rotary_dim)


def inputs(shapes: LayerShapes, whole: Iterable[Kept]) -> list[Kept]:
    """Return what of a layer is kept when all of it is recomputed: its inputs, and MTP's output for the head."""
    names = ("input of the layer",)
    held = list(whole)
    if any(each.name == "MTP's embedding" for each in held):
        names = ("MTP's embedding", "MTP's output")
    return [each for each in held if each.name in names]


def buffers(shapes: LayerShapes) -> float:
    """Return the bytes that exist only while the forward of a layer without routed experts runs."""
    return shapes.numbers.plain(shapes.whole, 2 * shapes.model.intermediate_size // shapes.layout.tp)
