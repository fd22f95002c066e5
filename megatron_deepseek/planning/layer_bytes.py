"""What one layer takes on the device and the host, by how it is run: kept, partly or wholly recomputed, offloaded.

A search chooses a mode for every layer; the arguments of a run give one to all layers of a stage alike, and offload the
first ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_deepseek.planning.activations import layer, mtp, remaining, staying, total
from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes
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
class Backward:
    """A moment of a layer's backward, in which its MLP (`of_mlp`) or its attention is at work: `bytes` that exist then,
    less those of the layer's kept ones that are free again; `left` of what waits for weight gradients is there too.
    """

    of_mlp: bool
    bytes: float
    left: float = 0.0


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of a micro-batch. `kept` on the device and `host` in the host's memory from forward to backward; `forward`
    exists only while the layer runs; `moments` are those of its backward; `waiting` is what its weight gradients need
    where a schedule makes them later.
    """

    kept: float
    host: float
    forward: float
    moments: tuple[Backward, ...]
    waiting: float

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
def layer_bytes(shapes: LayerShapes, index: int, mode: LayerMode) -> LayerBytes:
    """Return what layer `index` takes; ids from num_hidden_layers on are MTP modules. Equal layers are counted once."""
    return _of_kind(shapes, _representative(shapes, index), mode)


def _representative(shapes: LayerShapes, index: int) -> int:
    """Return the first layer that is like layer `index`."""
    model = shapes.model
    if index >= model.num_hidden_layers:
        return index
    kind = model.is_moe_layer(index), model.window_of(index)
    return next(other for other in range(model.num_hidden_layers)
                if (model.is_moe_layer(other), model.window_of(other)) == kind)


@lru_cache(1024)
def _of_kind(shapes: LayerShapes, index: int, mode: LayerMode) -> LayerBytes:
    depth = index - shapes.model.num_hidden_layers
    whole = tuple(mtp(shapes, depth) if depth >= 0 else layer(shapes, index))
    waiting = deferred_inputs(remaining(whole, ())) + deferred_gradients(shapes, index)
    moments = _moments(shapes, index, whole, mode)
    if mode.full:
        kept, stays = total(inputs(shapes, whole)), 0.0
    else:
        kept, stays = total(whole, mode.again), staying(whole, mode.again)
    if mode.offloaded:
        back = kept - stays - sum(each.bytes for each in whole if each.name == "MTP's output")
        host = back + _offloaded_too(shapes, depth, mode)
        return LayerBytes(kept - back, host, buffers(shapes, index) + host, _brought_back(moments, whole, host, mode),
                          waiting)
    again = total(whole) - kept if mode.full else 0.0
    return LayerBytes(kept, 0.0, buffers(shapes, index) + again, moments, waiting)


def _moments(shapes: LayerShapes, index: int, whole: tuple[Kept, ...], mode: LayerMode) -> tuple[Backward, Backward]:
    """Return the moments of a layer that keeps all on the device. The MLP comes first, and what it has kept, or what
    was made again for it, is free when attention's turn comes.
    """
    block, others = _of_mlp(whole)
    stream = shapes.numbers.plain(shapes.stream, 2 * shapes.model.hidden_size)
    in_mlp, in_attention = stream + mlp_gradients(shapes, index), stream + attention_in_flight(shapes)
    left = deferred_inputs(remaining(block, ())) + deferred_gradients(shapes, index) - attention_gradients(shapes)
    if mode.full:
        kept = total(inputs(shapes, whole))
        return (Backward(True, total(whole) - kept + in_mlp),
                Backward(False, total(others) - kept + in_attention, left))
    return (Backward(True, largest_made_again(block, mode.again) + in_mlp),
            Backward(False, largest_made_again(others, mode.again) - total(block, mode.again) + in_attention, left))


def _of_mlp(whole: tuple[Kept, ...]) -> tuple[tuple[Kept, ...], tuple[Kept, ...]]:
    """Return what belongs to a layer's MLP, from the input of its norm on, and what belongs to all before it."""
    begin = next(at for at, each in enumerate(whole) if each.name == "input of the MLP's norm")
    block = tuple(each for each in whole[begin:] if each.name != "MTP's output")
    return block, tuple(each for each in whole if each not in block)


def _offloaded_too(shapes: LayerShapes, depth: int, mode: LayerMode) -> float:
    """Return what goes to the host beside what a layer keeps: MTP's first state, and each layer's rotary table."""
    state = shapes.numbers.plain(shapes.stream, shapes.model.hidden_size) if depth >= 0 else 0.0
    return state + (0 if mode.full else 4 * shapes.length // shapes.layout.cp * shapes.model.rotary_dim)


def _brought_back(moments: tuple[Backward, Backward], whole: tuple[Kept, ...], host: float, mode: LayerMode
                  ) -> tuple[Backward, Backward]:
    """Return the moments of a layer whose kept tensors lie in the host's memory: those of the MLP come back first, and
    then those of attention.
    """
    in_mlp, in_attention = moments
    if mode.full:
        return replace(in_mlp, bytes=in_mlp.bytes + host), replace(in_attention, bytes=in_attention.bytes + host)
    block = _of_mlp(whole)[0]
    of_mlp = total(block, mode.again) - staying(block, mode.again)
    return (replace(in_mlp, bytes=in_mlp.bytes + of_mlp),
            replace(in_attention, bytes=in_attention.bytes + host))


def inputs(shapes: LayerShapes, whole: Iterable[Kept]) -> list[Kept]:
    """Return what of a layer is kept when all of it is recomputed: its inputs, and MTP's output for the head."""
    names = ("input of the layer",)
    held = list(whole)
    if any(each.name == "MTP's embedding" for each in held):
        names = ("MTP's embedding", "MTP's output")
    return [each for each in held if each.name in names]


def largest_made_again(whole: Iterable[Kept], again: Iterable[str]) -> float:
    """Return the bytes of the module that makes most again: they exist one after the other."""
    held = list(whole)
    return max((sum(each.bytes for each in held if each.again == name) for name in again), default=0.0)


_PRODUCT_INPUTS = frozenset((
    "attention's input", "gathered latents", "normed query latent", "normed key-value latent", "attention's output",
    "MLP's input", "MLP: hidden", "experts' rows", "experts: hidden", "MTP's joined input"))


def deferred_inputs(whole: Iterable[Kept]) -> float:
    """Sum the inputs of the products whose weight gradients a zero-bubble schedule leaves for later, also those that
    were made again: they wait with the gradients (parallel/zero_bubble.py).
    """
    return sum(each.bytes for each in whole if each.name in _PRODUCT_INPUTS)


def deferred_gradients(shapes: LayerShapes, index: int) -> float:
    """Sum the gradients of those products' outputs, which wait with their inputs; in FP8 also the inputs of
    down-projections, SwiGLU's outputs, which are kept in another form until then.
    """
    model, numbers, layout, form = shapes.model, shapes.numbers, shapes.layout, shapes.numbers.waiting_gradient
    found = attention_gradients(shapes) + form(shapes.whole, model.hidden_size)
    if index >= model.num_hidden_layers:
        found += numbers.plain(shapes.stream, model.hidden_size)  # eh_proj's
    parts = 3 if numbers.fp8 else 2  # gate, up, and in FP8 the down-projection's input
    moe = model.is_moe_layer(index)
    width = model.n_shared_experts * model.moe_intermediate_size if moe else model.intermediate_size
    if width:
        found += parts * form(shapes.whole, width // layout.tp) + form(shapes.whole, model.hidden_size)
    if moe:
        groups, rows = model.n_routed_experts // layout.ep, expert_rows(shapes)
        found += parts * form(rows, model.moe_intermediate_size // layout.etp, groups)
        found += form(rows, model.hidden_size, groups)
    return found


def attention_gradients(shapes: LayerShapes) -> float:
    """Sum the gradients of the outputs of attention's products but the last, as they wait for weight gradients."""
    model, form = shapes.model, shapes.numbers.waiting_gradient
    found = form(shapes.whole, shapes.heads * model.qk_head_dim)
    if model.grouped_query:
        return found + 2 * form(shapes.whole, shapes.kv_product_heads * model.head_dim)
    found += form(shapes.stream, model.kv_lora_rank + model.qk_rope_head_dim)
    if model.q_lora_rank:
        found += form(shapes.stream, model.q_lora_rank)
    if shapes.layout.cp == 1:
        found += form(shapes.whole, shapes.heads * (model.qk_nope_head_dim + model.v_head_dim))
    return found


def expert_rows(shapes: LayerShapes) -> float:
    """Return how many rows this rank's experts get."""
    rows = shapes.own * shapes.model.num_experts_per_tok * shapes.served * shapes.layout.etp
    return rows * (shapes.traffic.imbalance if shapes.layout.ep > 1 else 1)


def buffers(shapes: LayerShapes, index: int) -> float:
    """Return the bytes that exist only while a layer's forward sends tokens to experts: rows before they are sent and
    as they arrive, before they are sorted by expert; or whole tokens of the expert group under `allgather`.
    """
    model, layout = shapes.model, shapes.layout
    if not model.is_moe_layer(index):
        return shapes.numbers.plain(shapes.whole, 2 * model.intermediate_size // layout.tp)
    if layout.ep == 1:
        return shapes.numbers.plain(expert_rows(shapes), model.hidden_size)
    if shapes.traffic.dispatcher == "allgather":
        return 2 * shapes.numbers.plain(shapes.own * layout.ep, model.hidden_size)
    sent = shapes.own * model.num_experts_per_tok
    across = shapes.own * shapes.traffic.nodes * 2 if shapes.traffic.dispatcher == "grouped" else 0
    return shapes.numbers.plain(sent + expert_rows(shapes) + across, model.hidden_size)


def attention_in_flight(shapes: LayerShapes) -> float:
    """Return the bytes of the gradients of queries, keys, values and output, which exist at once in the backward."""
    of_head = shapes.model.qk_head_dim + shapes.model.value_head_dim
    return shapes.numbers.plain(shapes.whole, (shapes.heads + shapes.kv_heads) * of_head)


def mlp_gradients(shapes: LayerShapes, index: int) -> float:
    """Return the bytes of the gradients of an MLP's result, of its hidden values and of gate and up, which exist at
    once in the backward, with the buffers in which gradients of experts' rows come and go.
    """
    model, numbers, layout = shapes.model, shapes.numbers, shapes.layout
    if not model.is_moe_layer(index):
        return numbers.plain(shapes.whole, 3 * model.intermediate_size // layout.tp)
    width = 3 * model.moe_intermediate_size // layout.etp
    return numbers.plain(expert_rows(shapes), model.hidden_size + width) + buffers(shapes, index)
