"""What a layer's backward makes and frees, in its order, on a tape of bytes (byte_tape.py).

It mirrors the order in which autograd goes back through the modules' code, as activations.py mirrors what they keep:
each operator makes its gradients before it frees what it has read. Tensors smaller than a token's hidden state are left
out. `docs/dry_run.md` says how it is compared with the code itself.
"""

from collections.abc import Iterable

from megatron_deepseek.planning.adapter_inputs import AS_NUMBERS
from megatron_deepseek.planning.attention_tape import grouped_query_backward, latent_backward
from megatron_deepseek.planning.byte_tape import Backward, Tape
from megatron_deepseek.planning.forward_bytes import Forward
from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes
from megatron_deepseek.planning.numbers import TILE
from megatron_deepseek.planning.trained_weights import ALL, Trained


def layer_moments(shapes: LayerShapes, index: int, whole: tuple[Kept, ...], there: Iterable[Kept], deferred: bool,
                  again: Forward | None, trained: Trained = ALL) -> tuple[Backward, ...]:
    """Return the moments of the backward of layer `index`, which keeps `there` of `whole` on the device.

    `deferred`: weight gradients are made apart; `again`: what the layer has made while it runs again as a whole, None
    if it does not. `trained`: which of its weights are trained, or have adapters.
    """
    there = list(there)
    model = shapes.model
    tape = Tape(whole, there, deferred, shapes.numbers, trained, model.n_routed_experts // shapes.layout.ep)
    stream = shapes.numbers.plain(shapes.stream, shapes.model.hidden_size)
    tape.make(stream)  # the gradient of the layer's output
    if again is not None:
        held, turns = sum(each.bytes for each in there), shapes.traffic.exchanges
        tape.attend_again(again.attending - held)
        for made, number in ((again.gathering, turns.out), (again.most, turns.back)):
            tape.rerun(made - held, number * model.is_moe_layer(index))
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
    (grouped_query_backward if model.grouped_query else latent_backward)(tape, shapes, stream, by_blocks)
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
        key = (each.dense, each.experts, each.given, each.ends, each.ended, each.piece, each.waits, each.reruns,
               each.attends)
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
          received: bool = False, as_tiles: bool = False, uneven: bool = False) -> None:
    """Go back through the product behind SwiGLU, and SwiGLU, to the gradients of gate and up. FP8 makes those as tiles,
    and SwiGLU's output again. `as_tiles`: the gradient is there in 1x128 tiles alone. `uneven`: no tile ends between
    gate and up, whose gradients are then made as numbers first (ops/backends/cuda/quantize.py).
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
    tape.make((2 - as_tiles - frozen) * of_gradient)
    tape.make(hidden)
    tape.make(4 * hidden * uneven)  # gate and up as numbers, and their gradients
    tape.make(4 * tiles)
    tape.drop(4 * hidden * uneven)
    tape.make(0.0 if frozen else tiles)
    if frozen:
        tape.drop(of_gradient)
    else:
        tape.weigh(of_gradient, of_gradient + tiles, parameters, experts)
    tape.free(source, source + AS_NUMBERS)
    tape.drop(hidden, 0.0 if received or as_tiles else gradient)


def _mlp(tape: Tape, shapes: LayerShapes, width: int, stream: float) -> None:
    """Go back through a SwiGLU block (model/moe.py: `MLP`)."""
    numbers, h, width = shapes.numbers, shapes.model.hidden_size, width // shapes.layout.tp
    gathered, hidden = numbers.plain(shapes.whole, h), numbers.plain(shapes.whole, width)
    if shapes.gathers:
        tape.make(gathered)  # the gradient of what TP has reduced and scattered
    _down(tape, "MLP", gathered, hidden, h * width, received=not shapes.gathers, uneven=width % TILE > 0)
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
    copies, rows = shapes.copies, shapes.expert_rows
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
