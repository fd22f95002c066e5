"""What the output head and its loss take: kept for the backward, and while a forward or a backward runs.

model/head.py makes logits of all tokens at once, or by chunks where they are many. On CUDA without chunks the logits
wait in the layers' dtype and become their gradient in place (parallel/vocabulary.py); on CPU with one tensor-parallel
rank torch's own cross-entropy keeps them as log-probabilities in float32.
"""

from collections.abc import Iterator

from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes
from megatron_deepseek.planning.numbers import INDEX

LOGITS_BYTES = 256 * 2**20  # model/head.py's; a test holds them equal
ROWS = 128
_WHOLE = ("logits", "log-probabilities")  # the names of what is kept of all logits


def default_chunk(rows: int, element: int) -> int:
    """Return how many tokens' logits of `rows` ids are made at once if nobody says (model/head.py)."""
    most = max(1, LOGITS_BYTES // (rows * element))
    return most // ROWS * ROWS or most


def _rows(shapes: LayerShapes) -> int:
    """Return the rows of the head's weight on a rank: its part of the vocabulary, or a reward model's one."""
    return 1 if shapes.model.reward_head else shapes.model.vocab_size // shapes.layout.tp


def chunk_of(shapes: LayerShapes, asked: int | None) -> int | None:
    """Return the tokens of a chunk, None where all are one."""
    chunk = asked or default_chunk(_rows(shapes), shapes.numbers.element)
    return chunk if chunk < shapes.whole else None


def head(shapes: LayerShapes, chunk: int | None, predictions: int) -> Iterator[Kept]:
    """Yield what one prediction's head keeps; `chunk` is `chunk_of`'s, `predictions` how many the model makes."""
    model, numbers, layout, tokens = shapes.model, shapes.numbers, shapes.layout, shapes.whole
    vocabulary = _rows(shapes)
    if shapes.gathers:
        yield Kept("head's gathered input", numbers.plain(tokens, model.hidden_size))
    if predictions > 1 and shapes.sequences > 1:
        yield Kept("labels", tokens * INDEX, stays=True)
    if chunk is not None:
        yield Kept("statistics of logits", 3 * tokens * numbers.wide)
        yield Kept("derivatives of the head's input", numbers.plain(tokens, model.hidden_size))
    elif layout.tp == 1 and not numbers.cuda:
        yield Kept("log-probabilities", tokens * vocabulary * numbers.wide + numbers.wide)
    else:
        yield Kept("logits", numbers.plain(tokens, vocabulary))
        yield Kept("statistics of logits", (3 if layout.tp > 1 else 2) * tokens * numbers.wide)


def head_forward(shapes: LayerShapes, chunk: int | None) -> float:
    """Return the bytes that exist only while a prediction's loss is made: a chunk's logits, and where no kernel makes
    them their gradient in place, float32 numbers of each, two with the gradient.
    """
    vocabulary, tokens = _rows(shapes), min(chunk or shapes.whole, shapes.whole)
    wide = 0 if _in_place(shapes) else tokens * vocabulary * shapes.numbers.wide
    return wide if chunk is None else 2 * wide + shapes.numbers.plain(tokens, vocabulary)


def _in_place(shapes: LayerShapes) -> bool:
    """Return whether a kernel makes logits their gradient in place (ops/cross_entropy.py): bfloat16 ones on CUDA."""
    return shapes.numbers.cuda and shapes.numbers.element < shapes.numbers.wide


def _gradient_of_logits(shapes: LayerShapes, chunk: int | None) -> float:
    """Return the bytes while the gradient of all logits is made beside them; 0 where it is not made by this project's
    code (parallel/vocabulary.py), or in their place.
    """
    by_torch = shapes.layout.tp == 1 and not shapes.numbers.cuda
    return 0.0 if chunk is not None or by_torch or _in_place(shapes) else (
        2 * shapes.whole * _rows(shapes) * shapes.numbers.wide)


def head_backward(shapes: LayerShapes, chunk: int | None, trained: bool = True, predictions: int = 1) -> float:
    """Return the bytes that exist only while the backward of the head runs, beside what it keeps: the gradients of the
    head's weight and input, and a block of logits that is made again for the weight's. With a frozen weight it is the
    input's alone. Two of several `predictions` give the weight a gradient each, and then their sum is made. By then
    logits that were kept whole are free, and the inputs' gradients are there.
    """
    model, numbers = shapes.model, shapes.numbers
    vocabulary = _rows(shapes)
    if not trained:
        return numbers.plain(shapes.whole, model.hidden_size)
    weight, of_input = numbers.plain(vocabulary, model.hidden_size), numbers.plain(shapes.whole, model.hidden_size)
    first = max(weight + of_input + head_forward(shapes, chunk), _gradient_of_logits(shapes, chunk))
    if predictions == 1:
        return first
    if chunk is not None:
        return first + 2 * weight
    logits = sum(each.bytes for each in head(shapes, chunk, predictions) if each.name in _WHOLE)
    return max(first, first + weight + of_input - logits,
               *(3 * weight + made * (of_input - logits) for made in range(2, predictions + 1)))
