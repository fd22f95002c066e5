"""What a layer keeps for its backward, tensor by tensor, from the shapes that the model's code has.

Each function reads like the module that it counts (model/moe.py, model/layer.py; attention_activations.py has
model/attention/): a tensor that two operators keep is counted once, views are not counted, weights never.
tests/unit/planning/test_activations.py and tests/parallel/test_planned_memory.py hold the sums, to the byte, against
what saved-tensor hooks see on CPU.

Rows are float: with experts over several ranks they are averages, or those of the fullest rank.
"""

from collections.abc import Iterable, Iterator

from megatron_deepseek.planning.attention_activations import attention, norm
from megatron_deepseek.planning.layer_shapes import EXPERT_ACTIVATION, LAYERNORM, Kept, LayerShapes
from megatron_deepseek.planning.numbers import INDEX, Numbers


def layer(shapes: LayerShapes, index: int, dropped: float = 0) -> Iterator[Kept]:
    """Yield what decoder layer `index` keeps, its input included. `dropped`: tokens of the rank that do not go to
    routed experts, as those of MTP without a label.
    """
    model, numbers = shapes.model, shapes.numbers
    yield Kept("input of the layer", numbers.plain(shapes.stream, model.hidden_size))
    yield from norm("attention's norm", shapes.stream, numbers)
    yield from attention(shapes, by_blocks=shapes.layout.cp > 1 or model.window_of(index) is not None)
    yield Kept("input of the MLP's norm", numbers.plain(shapes.stream, model.hidden_size))
    yield from norm("MLP's norm", shapes.stream, numbers)
    if model.is_moe_layer(index):
        yield from experts(shapes, dropped)
    else:
        yield from entered(shapes)
        yield from mlp(shapes, model.intermediate_size)


def mtp(shapes: LayerShapes, depth: int) -> Iterator[Kept]:
    """Yield what MTP module `depth` (from 0) keeps, but for the state that it begins with, which is the last one's."""
    model, numbers = shapes.model, shapes.numbers
    yield from embedding(shapes)
    yield Kept("MTP's embedding", numbers.plain(shapes.stream, model.hidden_size))
    for name in ("embedding's norm", "state's norm", "last norm"):
        yield from norm(f"MTP: {name}", shapes.stream, numbers)
    yield Kept("MTP's joined input", numbers.plain(shapes.stream, 2 * model.hidden_size))
    yield from layer(shapes, model.num_hidden_layers + depth, (depth + 1) * shapes.own / shapes.length)
    yield Kept("input of MTP's last norm", numbers.plain(shapes.stream, model.hidden_size))
    if not shapes.gathers or depth + 1 < model.num_nextn_predict_layers:
        yield Kept("MTP's output", numbers.plain(shapes.stream, model.hidden_size))


def embedding(shapes: LayerShapes) -> Iterator[Kept]:
    """Yield what looking tokens up keeps beside their ids: with a divided vocabulary the rows, and whose they are."""
    if shapes.layout.tp > 1:
        yield Kept("rows of the vocabulary", shapes.whole * (INDEX + 1), stays=True)


def entered(shapes: LayerShapes) -> Iterator[Kept]:
    """Yield the input that the products of an MLP share. Where TP gathered it, it is no norm's output."""
    yield Kept("MLP's input", shapes.numbers.product_input(shapes.whole, shapes.model.hidden_size),
               None if shapes.gathers else LAYERNORM)


def mlp(shapes: LayerShapes, width: int) -> Iterator[Kept]:
    """Yield what a SwiGLU block keeps beside its input (model/moe.py: `MLP`)."""
    yield from swiglu("MLP", shapes.whole, width // shapes.layout.tp, shapes.numbers, None)


def swiglu(name: str, rows: float, width: int, numbers: Numbers, again: str | None) -> Iterator[Kept]:
    """Yield gate and up, and their product, which the FP8 recipe makes again."""
    yield Kept(f"{name}: gate and up", 2 * numbers.product_input(rows, width))
    if not numbers.fp8:
        yield Kept(f"{name}: hidden", numbers.plain(rows, width), again)


def experts(shapes: LayerShapes, dropped: float) -> Iterator[Kept]:
    """Yield what shared and routed experts keep, the layer's normed input included (model/moe.py: `MoE`)."""
    model, numbers, layout = shapes.model, shapes.numbers, shapes.layout
    if model.n_shared_experts:
        yield from entered(shapes)
        yield from mlp(shapes, model.n_shared_experts * model.moe_intermediate_size)
    yield from router(shapes)
    copies = (shapes.own - dropped) * model.num_experts_per_tok * shapes.served
    yield from dispatch(shapes, copies, complete=not dropped)
    rows = copies * layout.etp * (shapes.traffic.imbalance if layout.ep > 1 else 1)
    yield Kept("experts' rows", numbers.product_input(rows, model.hidden_size))
    again = EXPERT_ACTIVATION if not numbers.fp8 else None
    yield from swiglu("experts", rows, model.moe_intermediate_size // layout.etp, numbers, again)
    if not shapes.weighs_before:
        yield Kept("experts' results", numbers.plain(copies, model.hidden_size))


def router(shapes: LayerShapes) -> Iterator[Kept]:
    """Yield what the router keeps (model/router.py): its input as it is given, which shared experts keep too. Without
    sequence parallelism it is a slice of the norm's output: a copy of several sequences' tokens, of one's a view.
    """
    model, numbers, layout, own = shapes.model, shapes.numbers, shapes.layout, shapes.own
    if layout.tp > 1 and not layout.sequence_parallel and shapes.sequences > 1:
        yield Kept("router's input", numbers.plain(own, model.hidden_size))
    elif not model.n_shared_experts or numbers.fp8 or shapes.gathers:
        yield Kept("router's input", numbers.plain(shapes.stream, model.hidden_size), LAYERNORM)
    yield Kept("router's scores", own * model.n_routed_experts * numbers.wide)
    yield Kept("chosen experts", own * model.num_experts_per_tok * INDEX, stays=True)
    if model.norm_topk_prob and model.num_experts_per_tok > 1:
        yield Kept("routing weights before they are normalised", own * (model.num_experts_per_tok + 1) * numbers.wide)
    if shapes.balance:
        yield from balance_loss(shapes)


def balance_loss(shapes: LayerShapes) -> Iterator[Kept]:
    """Yield what the balance losses keep (model/balance_loss.py): sums of scores, and factors of each sequence."""
    model, numbers = shapes.model, shapes.numbers
    if model.scoring_func == "sigmoid":
        yield Kept("sums of scores", shapes.own * numbers.wide)
    if model.num_nextn_predict_layers:
        yield Kept("which tokens are routed", shapes.own, stays=True)
    rows = shapes.sequences if shapes.per_sequence else 1
    yield Kept("balance factors", rows * (1 + model.n_routed_experts + 2 * model.n_group) * numbers.wide)


def dispatch(shapes: LayerShapes, copies: float, complete: bool) -> Iterator[Kept]:
    """Yield routing weights and indices of where copies of tokens went (ops/copies.py, parallel/expert*.py)."""
    numbers, layout, own, chosen = shapes.numbers, shapes.layout, shapes.own, shapes.model.num_experts_per_tok
    kind = shapes.traffic.dispatcher if layout.ep > 1 else "alltoall"
    if shapes.weighs_before:  # Megatron-LM's: one index for each copy
        yield Kept("routing weights", own * chosen * numbers.wide)
        yield Kept("places of copies", copies * INDEX, stays=True)
        return
    if kind == "grouped":
        yield from across_nodes(shapes)
    tokens = own * layout.ep if kind == "allgather" else own
    if kind != "grouped":
        yield Kept("routing weights", tokens * chosen * numbers.wide)
    if complete and kind == "alltoall":
        yield Kept("places of copies", (own * chosen + copies) * numbers.index, stays=True)
    else:
        places = 0 if kind == "grouped" else tokens * chosen
        yield Kept("places of copies", (places + 2 * copies) * INDEX, stays=True)
    if layout.ep > 1 and kind != "allgather":
        yield Kept("order of received rows", 2 * copies * shapes.traffic.imbalance * numbers.index, stays=True)
    if layout.etp > 1:
        yield from gathered_slices(shapes, copies)


def across_nodes(shapes: LayerShapes) -> Iterator[Kept]:
    """Yield what the level between nodes of the grouped dispatcher keeps: partial sums of each token and node, the
    weights that travelled with tokens, and where they went.
    """
    numbers, own, chosen = shapes.numbers, shapes.own, shapes.model.num_experts_per_tok
    across, nodes = own * shapes.traffic.nodes, shapes.traffic.all_nodes
    yield Kept("partial sums of nodes", numbers.plain(across, shapes.model.hidden_size) + own * nodes * numbers.element)
    yield Kept("routing weights", across * chosen * numbers.wide)
    yield Kept("places of nodes", (3 * across + own * nodes + across * chosen) * INDEX, stays=True)


def gathered_slices(shapes: LayerShapes, copies: float) -> Iterator[Kept]:
    """Yield what expert-tensor parallelism keeps: the results of this rank's slices for everyone's rows."""
    rows = copies * shapes.layout.etp * shapes.traffic.imbalance
    results = shapes.numbers.plain(rows, shapes.model.hidden_size) + rows * shapes.numbers.element
    yield Kept("results of the experts' slices", results)
    indices = 2 if shapes.traffic.imbalance == 1 else 3  # without padding the rows are a permutation
    yield Kept("order of gathered rows", indices * rows * INDEX, stays=True)


def remaining(kept: Iterable[Kept], again: Iterable[str]) -> Iterator[Kept]:
    """Yield what is kept where the modules `again` are recomputed."""
    names = frozenset(again)
    return (each for each in kept if each.again not in names and each.for_again in (None, *names))


def total(kept: Iterable[Kept], again: Iterable[str] = ()) -> float:
    """Sum the bytes of what is kept where the modules `again` are recomputed."""
    return sum(each.bytes for each in remaining(kept, again))
