"""What attention keeps for its backward: MLA's latents and heads, or the heads of grouped-query attention.

Each function reads like the module that it counts (model/attention/mla.py, model/attention/gqa.py).
"""

from collections.abc import Iterator

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.planning.layer_shapes import LAYERNORM, UP_PROJECTION, Kept, LayerShapes
from megatron_deepseek.planning.numbers import Numbers


def norm(name: str, rows: float, numbers: Numbers) -> Iterator[Kept]:
    """Yield what RMSNorm keeps beside its input: one number a row."""
    yield Kept(f"{name}: statistics", rows * numbers.wide)


def travelling_width(model: ModelConfig, kv_heads: int) -> int:
    """Return how many numbers of a token other context ranks, or later tokens' queries, make keys and values of: MLA's
    latent with the turned key, or `kv_heads` heads of keys and values.
    """
    return 2 * kv_heads * model.head_dim if model.grouped_query else model.kv_lora_rank + model.qk_rope_head_dim


def attention(shapes: LayerShapes, by_blocks: bool) -> Iterator[Kept]:
    """Yield what a layer's attention keeps, its normed input included. `by_blocks`: it makes keys and values of what
    travels, block by block, over context ranks or within a sliding window.
    """
    if shapes.model.grouped_query:
        yield from grouped_query_attention(shapes, by_blocks)
    else:
        yield from latent_attention(shapes)
    yield from attention_output(shapes, by_blocks)


def latent_attention(shapes: LayerShapes) -> Iterator[Kept]:
    """Yield what MLA keeps but for its output."""
    model, numbers, layout = shapes.model, shapes.numbers, shapes.layout
    stream, whole, latent = shapes.stream, shapes.whole, travelling_width(model, 0)
    yield Kept("attention's input", numbers.product_input(stream, model.hidden_size), LAYERNORM)
    yield Kept("key-value latent", numbers.plain(stream, latent))
    yield from norm("key-value norm", stream, numbers)
    if model.q_lora_rank:
        yield Kept("query latent", numbers.plain(stream, model.q_lora_rank))
        yield from norm("query norm", stream, numbers)
    yield from up_projection_inputs(shapes, latent)
    q = Kept("queries", numbers.plain(whole, shapes.heads * model.qk_head_dim), UP_PROJECTION)
    statistics = Kept("log-sum-exps", whole * shapes.heads * numbers.wide)
    if layout.cp > 1:
        yield from (q, statistics)
        yield Kept("latents of the context ranks", layout.cp * numbers.plain(whole, latent))
    else:
        yield from (q, statistics)
        yield Kept("keys", numbers.plain(whole, shapes.heads * model.qk_head_dim), UP_PROJECTION)
        values = model.v_head_dim if numbers.cuda else model.qk_head_dim  # on CPU with zeros behind them
        yield Kept("values", numbers.plain(whole, shapes.heads * values), UP_PROJECTION)


def grouped_query_attention(shapes: LayerShapes, by_blocks: bool) -> Iterator[Kept]:
    """Yield what grouped-query and multi-head attention keep but for their output.

    The products of queries, keys and values share their input, which TP gathers. Where a rank keeps one of several
    heads that it made, values are a view of all on CUDA, and copied on the CPU.
    """
    model, numbers, whole, size = shapes.model, shapes.numbers, shapes.whole, shapes.model.head_dim
    yield Kept("attention's input", numbers.product_input(whole, model.hidden_size),
               None if shapes.gathers else LAYERNORM)
    yield Kept("queries", numbers.plain(whole, shapes.heads * size), UP_PROJECTION)
    yield Kept("log-sum-exps", whole * shapes.heads * numbers.wide)
    if model.qk_norm:
        yield from norms_of_heads(shapes)
    if by_blocks:
        travelled = numbers.plain(whole, travelling_width(model, shapes.kv_heads))
        yield Kept("keys and values of the context ranks", shapes.layout.cp * travelled)
        return
    yield Kept("keys", numbers.plain(whole, shapes.kv_heads * size), UP_PROJECTION)
    heads_of_values = shapes.kv_product_heads if numbers.cuda else shapes.kv_heads
    yield Kept("values", numbers.plain(whole, heads_of_values * size), UP_PROJECTION)


def norms_of_heads(shapes: LayerShapes) -> Iterator[Kept]:
    """Yield what Qwen3's norms of queries and keys read, which is not made again."""
    numbers, whole, size = shapes.numbers, shapes.whole, shapes.model.head_dim
    yield Kept("queries and keys before their norms",
               numbers.plain(whole, (shapes.heads + shapes.kv_product_heads) * size))
    yield from norm("norms of queries and keys", whole * (shapes.heads + shapes.kv_heads), numbers)


def up_projection_inputs(shapes: LayerShapes, latent: int) -> Iterator[Kept]:
    """Yield the inputs of the products by heads: normed latents, gathered over TP at once in the layers' dtype."""
    model, numbers, layout = shapes.model, shapes.numbers, shapes.layout
    query = model.q_lora_rank or model.hidden_size
    if layout.tp > 1:
        gathered = numbers.plain(shapes.whole, query + latent)
        yield Kept("gathered latents", gathered, for_again=UP_PROJECTION if numbers.fp8 else None)
        if not numbers.fp8:
            return
    elif layout.cp > 1 and model.q_lora_rank and numbers.fp8:
        yield Kept("query latent to be projected", numbers.plain(shapes.whole, query), for_again=UP_PROJECTION)
    if model.q_lora_rank or layout.tp > 1:
        yield Kept("normed query latent", numbers.product_input(shapes.whole, query))
    if layout.cp == 1:
        yield Kept("normed key-value latent", numbers.product_input(shapes.whole, model.kv_lora_rank))


def attention_output(shapes: LayerShapes, by_blocks: bool) -> Iterator[Kept]:
    """Yield attention's output, which its own backward and the product after it read.

    Of several heads it is a copy, where they do not lie side by side as the kernel made them; of one a view.
    """
    model, numbers = shapes.model, shapes.numbers
    width = shapes.heads * model.value_head_dim
    if numbers.fp8:
        yield Kept("attention's output", numbers.e5m6(shapes.whole, width))
        return
    computed = shapes.heads * (model.value_head_dim if numbers.cuda else model.qk_head_dim)
    viewed = shapes.heads == 1 and not by_blocks
    yield Kept("attention's output", numbers.plain(shapes.whole, computed if viewed else width))
    if not by_blocks and (shapes.packed or (computed != width and not viewed)):  # documents' outputs are joined
        yield Kept("attention's output as computed", numbers.plain(shapes.whole, computed))
