"""What a layer has on the device while its attention is made, in its forward or when that runs again.

By blocks, over context ranks or within a sliding window, results of the blocks are summed in float32 (ops/attention.py:
`LogSumExpMerge`), beside keys and values that are dropped behind it (parallel/blockwise_attention.py).
"""

from collections.abc import Iterable, Mapping
from itertools import takewhile

from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes
from megatron_deepseek.planning.trained_weights import OUTPUT, VALUE, Trained


def attention_forward(shapes: LayerShapes, index: int, kept: Iterable[Kept], trained: Trained) -> float:
    """Return the most bytes that layer `index` has made while its attention is computed, with what it keeps, in their
    order, of `kept`.
    """
    sizes: dict[str, float] = {}
    for each in kept:
        sizes[each.name] = sizes.get(each.name, 0.0) + each.bytes
    window = shapes.model.window_of(index)
    there = _in_blocks(shapes, sizes, window) if shapes.layout.cp > 1 or window is not None else \
        _projecting(shapes, sizes, trained)
    return max(there, _leaving(shapes, sizes, trained))


def _leaving(shapes: LayerShapes, sizes: Mapping[str, float], trained: Trained) -> float:
    """Return the bytes while attention's output is multiplied with a weight that is made plain, beside what its adapter
    has given; 0 for a plain weight.
    """
    model, numbers = shapes.model, shapes.numbers
    number = shapes.heads * model.value_head_dim * model.hidden_size
    given, made = numbers.plain(shapes.whole, model.hidden_size), numbers.made_plain(number)
    if not made:
        return 0.0
    return _before(sizes, "input of the MLP's norm") + trained.adapts(OUTPUT) * given + made + max(
        given, numbers.while_made(number))


def _before(sizes: Mapping[str, float], last: str) -> float:
    return sum(sizes[name] for name in takewhile(lambda name: name != last, sizes))


def _projecting(shapes: LayerShapes, sizes: Mapping[str, float], trained: Trained) -> float:
    """Return the bytes while MLA makes keys and values of latents, in three tensors where an adapter makes them too."""
    if shapes.model.grouped_query or "queries" not in sizes:
        return 0.0
    width = shapes.heads * (shapes.model.qk_nope_head_dim + shapes.model.v_head_dim)
    return _before(sizes, "keys") + shapes.numbers.plain(shapes.whole, width) * (3 if trained.adapts(VALUE) else 1)


def _in_blocks(shapes: LayerShapes, sizes: Mapping[str, float], window: int | None) -> float:
    """Return the bytes when a part's result is added to the sums: it, both scaled to each other, and what they give; or
    when the sums have become attention's output, which is then copied to lie head by head.

    The layer's input, the normed one and queries are there in any case. MLA makes keys and values of what travels, and
    its kernel's result is as wide as keys.
    """
    model, numbers, whole, heads = shapes.model, shapes.numbers, shapes.whole, shapes.heads
    key = model.head_dim if model.grouped_query else model.qk_head_dim
    stream, queries = numbers.plain(shapes.stream, model.hidden_size), numbers.plain(whole, heads * key)
    there = _before(sizes, "attention's output") + sum(
        size for name, size in (("input of the layer", stream), ("attention's input", stream), ("queries", queries))
        if name not in sizes)
    width = heads * model.value_head_dim
    output, sums = numbers.plain(whole, width), whole * width * numbers.wide
    if not model.grouped_query:
        there += queries + output  # keys and values of a block as long as the rank's own
    adding = _at_once(shapes, window) * (queries + 3 * sums)
    return there + sums + max(adding, 2 * output)


def _at_once(shapes: LayerShapes, window: int | None) -> float:
    """Return the largest share of a rank's queries that see a part of the keys together: those of one sequence where
    documents are packed, and within a window those of a window, or of one of a rank's two chunks if that is shorter.
    """
    share = 1 / shapes.sequences if shapes.packed else 1.0
    return share if window is None else share * min(0.5, window * shapes.layout.cp / shapes.length)
