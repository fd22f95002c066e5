"""What a layer's backward makes and frees, in its order, on a tape of bytes (byte_tape.py).

It mirrors the order in which autograd goes back through the modules' code, as activations.py mirrors what they keep:
each operator makes its gradients before it frees what it has read. Tensors smaller than a token's hidden state are left
out. `docs/dry_run.md` says how it is compared with the code itself.
"""

from collections.abc import Iterable

from megatron_deepseek.planning.byte_tape import Backward, Tape
from megatron_deepseek.planning.forward_bytes import Forward
from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes
from megatron_deepseek.planning.trained_weights import ALL, Trained


def layer_moments(shapes: LayerShapes, index: int, whole: tuple[Kept, ...], there: Iterable[Kept], deferred: bool,
                  again: Forward | None, trained: Trained = ALL) -> tuple[Backward, ...]:
    """Return the moments of the backward of layer `index`, which keeps `there` of `whole` on the device.

    `deferred`: weight gradients are made apart; `again`: what the layer has made while it runs again as a whole, None
    if it does not. `trained`: which of its weights are trained, or have adapters.
    """
    there = list(there)
    tape = Tape(whole, there, deferred, shapes.numbers, trained)
    model, stream = shapes.model, shapes.numbers.plain(shapes.stream, shapes.model.hidden_size)
    tape.make(stream)  # the gradient of the layer's output
    if again is not None:
        held, turns = sum(each.bytes for each in there), shapes.traffic.exchanges
        for made, number in ((again.gathering, turns.out), (again.most, turns.back)):
            tape.make(made - held)
            tape.exchange(number * model.is_moe_layer(index))
            tape.drop(made - held)
        tape.use(*(each.name for each in whole))
    mtp = index >= model.num_hidden_layers
    if mtp:
        tape.use("input of MTP's last norm")
        tape.make(stream)
        tape.drop(stream)
        tape.free("input of MTP's last norm")
    if model.is_moe_layer(index):
        _experts(tape, shapes, stream)
    else:
        _mlp(tape, shapes, model.intermediate_size, stream)
    _norm(tape, stream, "input of the MLP's norm")
    by_blocks = shapes.layout.cp > 1 or model.window_of(index) is not None
    (_heads_of_groups if model.grouped_query else _latent)(tape, shapes, stream, by_blocks)
    _norm(tape, stream, "input of the layer")
    if mtp:
        tape.product("MTP's joined input", stream, 2 * stream, 2 * model.hidden_size ** 2, in_recipe=False)
        tape.use("MTP's embedding")
        tape.make(2 * stream)
        tape.drop(2 * stream)
        tape.free("MTP's embedding")
    tape.end("layer")
    return _peaks(tape.moments)


def _peaks(moments: list[Backward]) -> tuple[Backward, ...]:
    """Return the moments that can be the highest: of those with the same weight gradients the one with most bytes."""
    best: dict[tuple, Backward] = {}
    for each in moments:
        key = each.dense, each.experts, each.given, each.ends, each.ended, each.piece, each.waits
        if key not in best or each.bytes > best[key].bytes:
            best[key] = each
    return tuple(best.values())


def _norm(tape: Tape, stream: float, source: str) -> None:
    """Go back through a norm and the sum that its input is also in. The gradient of its output is there."""
    tape.use(source)
    tape.make(stream)
    tape.drop(stream)
    tape.free(source)
    tape.make(stream)
    tape.drop(stream)
    if source == "input of the MLP's norm":
        tape.give_back(stream)
    else:
        tape.drop(stream)


def _down(tape: Tape, name: str, gradient: float, hidden: float, parameters: float, experts: bool = False,
          received: bool = False, as_tiles: bool = False) -> None:
    """Go back through the product behind SwiGLU, and SwiGLU, to the gradients of gate and up. FP8 makes those as tiles,
    and SwiGLU's output again. `as_tiles`: the gradient is there in 1x128 tiles alone.
    """
    source, tiles, of_gradient = f"{name}: gate and up", tape.tiles(hidden), tape.tiles(gradient)
    if not tiles:
        tape.product(f"{name}: hidden", 0.0 if received else gradient, hidden, parameters, experts)
        tape.use(source)
        tape.make(3 * hidden)
        tape.drop(2 * hidden)
        tape.free(source)
        return
    tape.use(source)
    frozen = tape.is_frozen(f"{name}: hidden")
    for made in ((2 - as_tiles - frozen) * of_gradient, hidden, 4 * tiles, 0.0 if frozen else tiles):
        tape.make(made)
    if frozen:
        tape.drop(of_gradient)
    else:
        tape.weigh(of_gradient, of_gradient + tiles, parameters, experts)
    tape.free(source)
    tape.drop(hidden, 0.0 if received or as_tiles else gradient)


def _mlp(tape: Tape, shapes: LayerShapes, width: int, stream: float) -> None:
    """Go back through a SwiGLU block (model/moe.py: `MLP`)."""
    numbers, h, width = shapes.numbers, shapes.model.hidden_size, width // shapes.layout.tp
    gathered, hidden = numbers.plain(shapes.whole, h), numbers.plain(shapes.whole, width)
    if shapes.gathers:
        tape.make(gathered)  # the gradient of what TP has reduced and scattered
    _down(tape, "MLP", gathered, hidden, h * width, received=not shapes.gathers)
    tape.products_of_swiglu("MLP's input", 2, hidden, gathered, h * width)
    tape.make(gathered)
    tape.drop(gathered, gathered)
    if shapes.gathers:
        tape.make(stream)
        tape.drop(gathered)


def _experts(tape: Tape, shapes: LayerShapes, stream: float) -> None:
    """Go back through shared and routed experts (model/moe.py: `MoE`): routed ones come first, then shared ones, then
    the router.
    """
    model, numbers, layout = shapes.model, shapes.numbers, shapes.layout
    h, own = model.hidden_size, shapes.own
    copies = own * model.num_experts_per_tok * shapes.served
    rows = copies * layout.etp * (shapes.traffic.imbalance if layout.ep > 1 else 1)
    sent, got, token = numbers.plain(copies, h), numbers.plain(rows, h), numbers.plain(own, h)
    of_expert = 3 * model.n_routed_experts // layout.ep * h * model.moe_intermediate_size // layout.etp
    hidden = numbers.plain(rows, model.moe_intermediate_size // layout.etp)
    for joined in ("partial sums of nodes", "results of the experts' slices", "experts' results"):
        tape.use(joined)
        tape.make(tape.size_of(joined))
        tape.drop(tape.size_of(joined))
        tape.free(joined)
    tape.make(sent)
    # FP8's gradients travel as tiles, and stay such to the product, but with `allgather`.
    as_tiles = numbers.fp8 and layout.ep > 1 and shapes.traffic.dispatcher != "allgather"
    if layout.ep > 1 or layout.etp > 1:
        _arrive(tape, shapes, sent, got, as_tiles)
    _down(tape, "experts", got, hidden, of_expert / 3, experts=True, as_tiles=as_tiles)
    if not numbers.fp8:
        tape.make(2 * hidden)
        tape.drop(2 * hidden)
    tape.products_of_swiglu("experts' rows", 1, 2 * hidden, got, of_expert * 2 / 3, experts=True)
    tape.end("experts")
    if layout.ep > 1 or layout.etp > 1:
        tape.make(got)
        tape.drop(got)
        tape.make(sent)
        tape.exchange(shapes.traffic.exchanges.home)
        tape.drop(got)
    tape.make(numbers.plain(own * model.num_experts_per_tok, h))
    tape.make(token)
    tape.drop(numbers.plain(own * model.num_experts_per_tok, h), sent)
    if model.n_shared_experts:
        _mlp(tape, shapes, model.n_shared_experts * model.moe_intermediate_size, stream)
    tape.use("router's input", "router's input in float32")
    wide = own * h * numbers.wide
    tape.make(wide + token)
    tape.free("router's input", "router's input in float32")
    tape.drop(wide)
    if numbers.element < numbers.wide:  # in full precision routers belong to their layer's unit (model/build.py)
        tape.end("router")
    tape.make(stream)
    tape.drop(2 * token, *([stream] if model.n_shared_experts else []))


def _arrive(tape: Tape, shapes: LayerShapes, sent: float, got: float, as_tiles: bool) -> None:
    """Go back to the experts' ranks: gradients are sent, and sorted by expert."""
    if as_tiles:
        tape.make(tape.tiles(sent))
    arrived = tape.tiles(got) if as_tiles else got
    tape.make(arrived)
    tape.exchange(shapes.traffic.exchanges.to_experts)
    tape.drop(sent, tape.tiles(sent) if as_tiles else 0.0)
    tape.make(arrived)
    tape.drop(arrived)


def _latent(tape: Tape, shapes: LayerShapes, stream: float, by_blocks: bool) -> None:
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


def _heads_of_groups(tape: Tape, shapes: LayerShapes, stream: float, by_blocks: bool) -> None:
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
