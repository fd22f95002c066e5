"""What the backward of a layer's attention makes and frees, in its order, on a tape of bytes (byte_tape.py).

It begins with the gradient of what attention adds to the stream, and ends with that of attention's input.
"""

from megatron_deepseek.planning.adapter_inputs import AS_NUMBERS
from megatron_deepseek.planning.byte_tape import Tape
from megatron_deepseek.planning.layer_shapes import LayerShapes


def latent_backward(tape: Tape, shapes: LayerShapes, stream: float, by_blocks: bool) -> None:
    """Go back through MLA (model/attention/mla.py)."""
    model, numbers, heads, whole = shapes.model, shapes.numbers, shapes.heads, shapes.whole
    h, query = model.hidden_size, model.q_lora_rank or model.hidden_size
    keys, values = numbers.plain(whole, heads * model.qk_head_dim), numbers.plain(whole, heads * model.v_head_dim)
    both = heads * (model.qk_nope_head_dim + model.v_head_dim)
    latent = numbers.plain(whole, model.kv_lora_rank)
    _output(tape, shapes, stream, values, heads * model.v_head_dim)
    if by_blocks:
        _blocks(tape, shapes, keys, keys, values, numbers.plain(whole, both), keys)
        tape.product(None, 0.0, latent, model.kv_lora_rank * both)
    else:
        beyond = _attend(tape, shapes, values, (keys, keys, values), model.qk_head_dim / model.v_head_dim)
        made = numbers.plain(whole, both)
        tape.make(made)
        tape.drop(values, beyond, keys)
        tape.product("normed key-value latent", made, latent, model.kv_lora_rank * both)
    tape.make(keys)
    tape.drop(keys)
    reduced = numbers.plain(whole, query)
    source = "normed query latent" if model.q_lora_rank or shapes.layout.tp > 1 else None
    tape.product(source, keys, reduced, query * heads * model.qk_head_dim)
    tape.free("gathered latents", "latents of the context ranks", "query latent", "key-value latent")
    tape.use("attention's input")
    if model.q_lora_rank:
        tape.product("attention's input", reduced, stream, query * h, stays=True)
        other = stream
    else:
        other = reduced
    tape.product("attention's input", latent, stream, h * (model.kv_lora_rank + model.qk_rope_head_dim))
    tape.make(stream)
    tape.drop(stream, other)


def grouped_query_backward(tape: Tape, shapes: LayerShapes, stream: float, by_blocks: bool) -> None:
    """Go back through grouped-query attention (model/attention/gqa.py). It turns queries and keys in float32."""
    model, numbers, heads, whole, size = shapes.model, shapes.numbers, shapes.heads, shapes.whole, shapes.model.head_dim
    h, queries = model.hidden_size, numbers.plain(whole, heads * size)
    keys, gathered = numbers.plain(whole, shapes.kv_heads * size), numbers.plain(whole, h)
    turned = 2 * whole * heads * size * numbers.wide
    _output(tape, shapes, stream, queries, heads * size)
    if by_blocks:
        _blocks(tape, shapes, queries, keys, keys, 0.0, queries)
    else:
        if not tape.has("queries"):
            tape.make(2 * queries + turned)
            tape.drop(2 * queries + turned)
        _attend(tape, shapes, queries, (queries, keys, keys), 1.0)
    for _ in ("values", "keys"):
        tape.product("attention's input", keys, gathered, h * shapes.kv_product_heads * size, stays=True)
    tape.make(gathered)
    tape.drop(2 * gathered)
    tape.make(turned + queries)
    tape.drop(turned + queries)
    tape.free("queries and keys before their norms")
    tape.product("attention's input", queries, gathered, h * heads * size)
    tape.make(stream)
    tape.drop(2 * gathered)


def _attend(tape: Tape, shapes: LayerShapes, output: float, gradients: tuple[float, float, float], wider: float
            ) -> float:
    """Go back through attention at once, from the gradient of its output to `gradients`, those of queries, keys and
    values, which are there afterwards. `wider`: the keys' width over the values'. Return the bytes that the values'
    gradient has beyond its own width.

    The FP8 recipe (ops/fp8/attention.py) calls the kernel itself: with the output, made of E5M6; with copies of it, of
    its gradient and of the values that are as wide as keys; and, within documents, with copies of the results.
    """
    tape.use("queries", "keys", "values", "attention's output")
    beyond = 0.0
    if not shapes.numbers.fp8:
        tape.make(sum(gradients))
    else:
        values = gradients[-1] * wider
        padded = 2 * output * wider + values if wider != 1 else 0.0
        results = gradients[0] + gradients[1] + values
        tape.make(output)
        if shapes.packed:  # row by row: their results are copied to one place
            tape.make(sum(gradients) + (padded + results) / shapes.sequences)
            tape.drop((padded + results) / shapes.sequences)
        else:
            tape.make(padded + results)
            tape.drop(padded)
            beyond = values - gradients[-1]
        tape.drop(output)
    tape.drop(output)
    tape.free("queries", "keys", "values", "attention's output as computed")
    tape.free_unless_deferred("attention's output")
    return beyond


def _output(tape: Tape, shapes: LayerShapes, stream: float, width_bytes: float, width: int) -> None:
    """Go back through the product of attention's output, which attention's own backward reads too."""
    gathered = shapes.numbers.plain(shapes.whole, shapes.model.hidden_size)
    if shapes.gathers:
        tape.make(gathered)
    apart = tape.size_of("attention's output as computed") > 0
    tape.product("attention's output", gathered, width_bytes, shapes.model.hidden_size * width, stays=not apart,
                 received=not shapes.gathers)
    tape.free("attention's output" + AS_NUMBERS)


def _blocks(tape: Tape, shapes: LayerShapes, queries: float, keys: float, values: float, projected: float,
            padded: float) -> None:
    """Go back through attention by blocks (parallel/blockwise_attention.py): keys and values of each rank's tokens are
    made again; the gradient of queries is summed in float32. In FP8 the output is made of its E5M6. The kernel takes
    packed rows one by one.
    """
    wide, output = queries / shapes.numbers.element * shapes.numbers.wide, values if projected else queries
    restored, tiles = output if shapes.numbers.fp8 else 0.0, 2 * tape.tiles(projected)
    tape.use("queries", "attention's output")
    tape.make(restored + wide)
    at_once = 1 / shapes.sequences if shapes.packed else 1.0
    pads = 3 * padded * at_once if keys != values else 0.0
    results = pads or (queries + keys + values) * at_once
    made = keys + values if projected else 0.0
    tape.make(projected + made)
    tape.drop(projected)
    tape.make(keys + values + pads + results)
    tape.drop(pads + results)
    tape.make(projected + tiles)
    tape.drop(projected, tiles, made)
    tape.drop(keys + values)
    tape.make(queries)
    tape.drop(restored, wide, output)
    tape.free("queries", "keys and values of the context ranks")
    tape.free_unless_deferred("attention's output")
    if not projected:
        tape.make(2 * keys)
