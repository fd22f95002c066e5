"""What a layer's weight gradients need where a zero-bubble schedule makes them later (parallel/zero_bubble.py): inputs
of products, also those that were made again, and the gradients of their outputs.

A frozen weight needs neither. An adapter that drops features has an input of its own, which no other product shares.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes
from megatron_deepseek.planning.trained_weights import (
    DOWN,
    EXPERTS_DOWN,
    EXPERTS_UP,
    GATE_AND_UP,
    JOIN,
    OUTPUT,
    QUERY,
    ROUTER,
    VALUE,
    Trained,
)

_PRODUCT_INPUTS = frozenset((
    "attention's input", "gathered latents", "normed query latent", "normed key-value latent", "attention's output",
    "MLP's input", "MLP: hidden", "experts' rows", "experts: hidden", "MTP's joined input"))


class Product(NamedTuple):
    """A product of a layer: which weight's it is, the rows and the width of its input, and the bytes of its output's
    `gradient` as that waits, in FP8 with its input where that is kept in another form until then. An adapter has as
    many A side by side as there are `matrices`.
    """

    weights: tuple[str, ...]
    rows: float
    width: int
    gradient: float
    matrices: int = 1


def waiting_bytes(shapes: LayerShapes, index: int, kept: Iterable[Kept], trained: Trained) -> float:
    """Return the bytes that wait for the weight gradients of layer `index`, which keeps `kept`."""
    found = sum(each.gradient for each in products(shapes, index) if trained.gradients_of(*each.weights))
    if trained.drops:
        found += sum(shapes.numbers.plain(each.rows, each.width) for each in products(shapes, index)
                     if trained.adapts(*each.weights))
        return found + _router(shapes, index, trained)
    return found + sum(each.bytes for each in kept if each.name in _PRODUCT_INPUTS and (
        each.name != "attention's output" or trained.gradients_of(OUTPUT)))


def inner_bytes(shapes: LayerShapes, index: int, trained: Trained) -> float:
    """Return the bytes of what adapters' A make, which are kept for B: in float32 the router's. Of MTP's module at
    depth d the last d tokens of a sequence go to no routed experts.
    """
    numbers, routed = shapes.numbers, 1 - max(0, index + 1 - shapes.model.num_hidden_layers) / shapes.length
    found = shapes.own * numbers.wide * (shapes.model.is_moe_layer(index) and trained.adapts(ROUTER))
    for each in products(shapes, index, apart=False):
        if trained.adapts(*each.weights):
            experts = not {EXPERTS_UP, EXPERTS_DOWN}.isdisjoint(each.weights)
            found += numbers.plain(each.rows * (routed if experts else 1), each.matrices)
    return trained.rank * found


def _router(shapes: LayerShapes, index: int, trained: Trained) -> float:
    """Return the bytes of the input of the router's adapter, whose own product waits for nothing."""
    adapted = shapes.model.is_moe_layer(index) and trained.adapts(ROUTER)
    return shapes.own * shapes.model.hidden_size * shapes.numbers.wide if adapted else 0.0


def products(shapes: LayerShapes, index: int, apart: bool = True) -> Iterator[Product]:
    """Yield the products of a layer, those alone whose weight gradients wait if these are made `apart`."""
    model, numbers, layout, form = shapes.model, shapes.numbers, shapes.layout, shapes.numbers.waiting_gradient
    h, whole = model.hidden_size, shapes.whole
    yield from attention_products(shapes, apart)
    width = shapes.heads * model.value_head_dim
    yield Product((OUTPUT,), whole, width, form(whole, h))
    if index >= model.num_hidden_layers:
        yield Product((JOIN,), shapes.stream, 2 * h, numbers.plain(shapes.stream, h))
    moe = model.is_moe_layer(index)
    width = (model.n_shared_experts * model.moe_intermediate_size if moe else model.intermediate_size) // layout.tp
    if width:
        for name in ("gate_proj", "up_proj"):
            yield Product(tuple(each for each in GATE_AND_UP if name in each), whole, h,
                          form(whole, width))
        yield Product(DOWN, whole, width, form(whole, h) + numbers.fp8 * form(whole, width))
    if moe:
        groups, rows, width = model.n_routed_experts // layout.ep, shapes.expert_rows, (
            model.moe_intermediate_size // layout.etp)
        yield Product((EXPERTS_UP,), rows, h, 2 * form(rows, width, groups), 2)
        yield Product((EXPERTS_DOWN,), rows, width,
                      form(rows, h, groups) + numbers.fp8 * form(rows, width, groups))


def attention_products(shapes: LayerShapes, apart: bool = True) -> Iterator[Product]:
    """Yield the products of attention but the last."""
    model, form = shapes.model, shapes.numbers.waiting_gradient
    h, whole, stream = model.hidden_size, shapes.whole, shapes.stream
    yield Product(QUERY, whole, model.q_lora_rank or h, form(whole, shapes.heads * model.qk_head_dim))
    if model.grouped_query:
        for name in ("k_proj", "v_proj"):
            yield Product((f"self_attn.{name}.weight",), whole, h,
                          form(whole, shapes.kv_product_heads * model.head_dim))
        return
    yield Product(("self_attn.kv_a_proj_with_mqa.weight",), stream, h,
                  form(stream, model.kv_lora_rank + model.qk_rope_head_dim))
    if model.q_lora_rank:
        yield Product(("self_attn.q_a_proj.weight",), stream, h, form(stream, model.q_lora_rank))
    # The first context rank makes keys and values of all ranks' tokens (parallel/block_mask.py), which all wait.
    seen = whole * (shapes.layout.cp if apart else 1)
    yield Product((VALUE,), seen, model.kv_lora_rank,
                  form(seen, shapes.heads * (model.qk_nope_head_dim + model.v_head_dim)))
