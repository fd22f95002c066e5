"""What one layer takes on the device and the host, by how it is run: kept, partly or wholly recomputed, offloaded.

A search chooses a mode for every layer; the arguments of a run give one to all layers of a stage alike, and offload the
first ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
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
class LayerBytes:
    """Bytes of a micro-batch. `kept` on the device and `host` in the host's memory from forward to backward; `forward`
    and `backward` exist only while the layer runs; `waiting` is what its weight gradients need where a schedule makes
    them later.
    """

    kept: float
    host: float
    forward: float
    backward: float
    waiting: float


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
    model = shapes.model
    depth = index - model.num_hidden_layers
    whole = tuple(mtp(shapes, depth) if depth >= 0 else layer(shapes, index))
    transient = gradients_in_flight(shapes, index)
    waiting = deferred_inputs(remaining(whole, ())) + deferred_gradients(shapes, index)
    if mode.full:
        kept = total(inputs(shapes, whole))
        again = total(whole) - kept
        stays = 0.0
    else:
        kept, stays = total(whole, mode.again), staying(whole, mode.again)
        again = largest_made_again(whole, mode.again)
    if mode.offloaded:
        output = sum(each.bytes for each in whole if each.name == "MTP's output")
        state = shapes.numbers.plain(shapes.stream, model.hidden_size) if depth >= 0 else 0.0
        table = 0 if mode.full else 4 * shapes.length // shapes.layout.cp * model.rotary_dim
        host = kept - stays - output + state + table  # MTP's first state goes too, and each layer's rotary table
        return LayerBytes(stays + output, host, buffers(shapes, index) + host, again + host + transient, waiting)
    return LayerBytes(kept, 0.0, buffers(shapes, index) + (again if mode.full else 0.0), again + transient, waiting)


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
    rows = shapes.own * shapes.model.num_experts_per_tok * shapes.layout.etp
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


def gradients_in_flight(shapes: LayerShapes, index: int) -> float:
    """Return the bytes of gradients that exist at once at the worst moment of a layer's backward.

    The stream's gradient twice (what came, and the sum), and beside it either attention's of queries, keys, values and
    output, or those of the MLP's result, of its hidden values and of gate and up.
    """
    model, numbers, layout = shapes.model, shapes.numbers, shapes.layout
    stream = numbers.plain(shapes.stream, 2 * model.hidden_size)
    of_head = model.qk_head_dim + model.value_head_dim
    attention = numbers.plain(shapes.whole, (shapes.heads + shapes.kv_heads) * of_head)
    if model.is_moe_layer(index):
        width = 3 * model.moe_intermediate_size // layout.etp
        block = numbers.plain(expert_rows(shapes), model.hidden_size + width) + buffers(shapes, index)
    else:
        block = numbers.plain(shapes.whole, 3 * model.intermediate_size // layout.tp)
    return stream + max(attention, block)
