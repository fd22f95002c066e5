"""What a layer's backward makes and frees, in its order: a tape of bytes, which says how much there is at any time.

It mirrors the order in which autograd goes back through the modules' code, as activations.py mirrors what they keep:
each operator makes its gradients before it frees what it has read. Tensors smaller than a token's hidden state are left
out. `docs/dry_run.md` says how it is compared with the code itself.

Where weight gradients are made apart a product frees neither its input nor the gradient of its output, which wait.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes


@dataclass(frozen=True)
class Backward:
    """A moment of a layer's backward. `bytes`: what exists then, less those of the layer's kept ones that are free
    again, without weight gradients, of which those of `dense` and `experts` parameters exist. `given`: the gradient of
    the layer's output is still there, and counted. `ends`: a unit of FSDP whose gradients are summed or reduced then,
    "experts" or "layer"; `experts_over`: that of routed experts has ended before.
    """

    bytes: float
    dense: float = 0.0
    experts: float = 0.0
    given: bool = True
    ends: str = ""
    experts_over: bool = False


class Tape:
    """Bytes as they come and go. `there`: the kept tensors of the layer that are on the device before its backward;
    others are made again, or brought back, when they are used.
    """

    def __init__(self, whole: Iterable[Kept], there: Iterable[Kept], deferred: bool):
        self._sizes: dict[str, float] = {}
        for each in whole:
            self._sizes[each.name] = self._sizes.get(each.name, 0.0) + each.bytes
        self._there = {each.name for each in there}
        self._deferred = deferred
        self._now, self._dense, self._experts, self._given, self._over = 0.0, 0.0, 0.0, True, False
        self.moments: list[Backward] = []

    def make(self, size: float) -> None:
        """Allocate so many bytes."""
        self._now += size
        self._note()

    def drop(self, *sizes: float) -> None:
        """Free what was made."""
        self._now -= sum(sizes)

    def use(self, *names: str) -> None:
        """Read kept tensors, which are made again or brought back if they are not there."""
        for name in names:
            if name in self._sizes and name not in self._there:
                self._there.add(name)
                self.make(self._sizes[name])

    def size_of(self, name: str) -> float:
        """Return the bytes of a kept tensor, 0 if the layer has none of this name."""
        return self._sizes.get(name, 0.0)

    def free(self, *names: str) -> None:
        """Free kept tensors."""
        for name in names:
            if name in self._there:
                self._there.remove(name)
                self._now -= self._sizes[name]

    def has(self, name: str) -> bool:
        """Return whether a kept tensor is there."""
        return name in self._there

    def free_unless_deferred(self, *names: str) -> None:
        """Free inputs of products, which wait where weight gradients are made apart."""
        if not self._deferred:
            self.free(*names)

    def product(self, source: str | None, gradient: float, result: float, parameters: float, experts: bool = False,
                stays: bool = False) -> None:
        """Go back through a product: from `gradient` bytes of its output's gradient to `result` bytes of its input's,
        and its weight's gradient. `source` is its kept input, which others read too if it `stays`.
        """
        if source is not None:
            self.use(source)
        if self._deferred:
            self.make(result)
            return
        if experts:
            self.make(result)
            self._experts += parameters
            self._note()
        else:
            self._dense += parameters
            self.make(result)
        self.drop(gradient)
        if source is not None and not stays:
            self.free(source)

    def give_back(self, size: float) -> None:
        """Free the gradient of the layer's output."""
        self._given = False
        self._now -= size

    def end(self, unit: str) -> None:
        """Mark the end of a unit of FSDP, whose weight gradients are then no longer in the layers' dtype."""
        if self._deferred:
            return
        self.moments.append(Backward(self._now, self._dense if unit == "experts" else 0.0, 0.0, self._given, unit,
                                     self._over))
        if unit == "experts":
            self._experts, self._over = 0.0, True
        else:
            self._dense = 0.0

    def _note(self) -> None:
        self.moments.append(Backward(self._now, self._dense, self._experts, self._given, "", self._over))


def layer_moments(shapes: LayerShapes, index: int, whole: tuple[Kept, ...], there: Iterable[Kept], deferred: bool,
                  again_at_once: bool) -> tuple[Backward, ...]:
    """Return the moments of the backward of layer `index`, which keeps `there` of `whole` on the device.

    `deferred`: weight gradients are made apart; `again_at_once`: the layer runs again as a whole.
    """
    tape = Tape(whole, there, deferred)
    model, stream = shapes.model, shapes.numbers.plain(shapes.stream, shapes.model.hidden_size)
    tape.make(stream)  # the gradient of the layer's output
    if again_at_once:
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
        tape.product("MTP's joined input", stream, 2 * stream, 2 * model.hidden_size ** 2)
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
        key = each.dense, each.experts, each.given, each.ends, each.experts_over
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


def _swiglu(tape: Tape, name: str, hidden: float, source: str) -> None:
    """Go back from the gradient of SwiGLU's output to those of gate and up; `source` is the kept pair."""
    tape.use(source)
    tape.make(3 * hidden)
    tape.drop(hidden, hidden)
    tape.free(source)


def _mlp(tape: Tape, shapes: LayerShapes, width: int, stream: float) -> None:
    """Go back through a SwiGLU block (model/moe.py: `MLP`)."""
    numbers, h, width = shapes.numbers, shapes.model.hidden_size, width // shapes.layout.tp
    gathered, hidden = numbers.plain(shapes.whole, h), numbers.plain(shapes.whole, width)
    if shapes.gathers:
        tape.make(gathered)  # the gradient of what TP has reduced and scattered
    tape.product("MLP: hidden", gathered if shapes.gathers else 0.0, hidden, h * width)
    _swiglu(tape, "MLP", hidden, "MLP: gate and up")
    for _ in range(2):
        tape.product("MLP's input", hidden, gathered, h * width, stays=True)
    tape.free_unless_deferred("MLP's input")
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
    if layout.ep > 1 or layout.etp > 1:
        tape.make(got)
        tape.drop(sent)
        tape.make(got)
        tape.drop(got)
    tape.product("experts: hidden", got, hidden, of_expert / 3, experts=True)
    _swiglu(tape, "experts", hidden, "experts: gate and up")
    tape.make(2 * hidden)
    tape.drop(2 * hidden)
    tape.product("experts' rows", 2 * hidden, got, of_expert * 2 / 3, experts=True)
    tape.end("experts")
    if layout.ep > 1 or layout.etp > 1:
        tape.make(got)
        tape.drop(got)
        tape.make(sent)
        tape.drop(got)
    tape.make(numbers.plain(own * model.num_experts_per_tok, h))
    tape.make(token)
    tape.drop(numbers.plain(own * model.num_experts_per_tok, h), sent)
    if model.n_shared_experts:
        _mlp(tape, shapes, model.n_shared_experts * model.moe_intermediate_size, stream)
    tape.use("router's input")
    wide = own * h * numbers.wide
    tape.make(wide + token)
    tape.free("router's input")
    tape.drop(wide)
    tape.make(stream)
    tape.drop(2 * token, *([stream] if model.n_shared_experts else []))


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
        tape.use("queries", "keys", "values")
        tape.make(2 * keys + values)
        tape.drop(values)
        tape.free("queries", "keys", "values", "attention's output", "attention's output as computed")
        made = numbers.plain(whole, both)
        tape.make(made)
        tape.drop(values, keys)
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
        tape.use("queries", "keys", "values")
        tape.make(queries + 2 * keys)
        tape.drop(queries)
        tape.free("queries", "keys", "values", "attention's output", "attention's output as computed")
    tape.product(None, keys, gathered, h * shapes.kv_product_heads * size)
    tape.product(None, keys, gathered, h * shapes.kv_product_heads * size)
    tape.make(gathered)
    tape.drop(2 * gathered)
    tape.make(turned + queries)
    tape.drop(turned + queries)
    tape.free("queries and keys before their norms")
    tape.use("attention's input")
    tape.product("attention's input", queries, gathered, h * heads * size)
    tape.make(stream)
    tape.drop(2 * gathered)


def _output(tape: Tape, shapes: LayerShapes, stream: float, width_bytes: float, width: int) -> None:
    """Go back through the product of attention's output, which attention's own backward reads too."""
    gathered = shapes.numbers.plain(shapes.whole, shapes.model.hidden_size)
    if shapes.gathers:
        tape.make(gathered)
    apart = tape.size_of("attention's output as computed") > 0
    tape.product("attention's output", gathered if shapes.gathers else 0.0, width_bytes,
                 shapes.model.hidden_size * width, stays=not apart)


def _blocks(tape: Tape, shapes: LayerShapes, queries: float, keys: float, values: float, projected: float,
            padded: float) -> None:
    """Go back through attention by blocks (parallel/blockwise_attention.py): keys and values of each rank's tokens are
    made again; the gradient of queries is summed in float32.
    """
    wide = queries / shapes.numbers.element * shapes.numbers.wide
    tape.use("queries", "attention's output")
    tape.make(wide)
    pads = 3 * padded if keys != values else 0.0
    made = keys + values if projected else 0.0
    tape.make(projected + made)
    tape.drop(projected)
    tape.make(keys + values + pads + (3 * padded if pads else queries + keys + values))
    tape.drop(pads + (3 * padded if pads else queries + keys + values))
    tape.make(projected)
    tape.drop(projected, made)
    tape.drop(keys + values)
    tape.make(queries)
    tape.drop(wide, values if projected else queries)
    tape.free("queries", "attention's output", "keys and values of the context ranks")
    if not projected:
        tape.make(2 * keys)
