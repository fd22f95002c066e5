"""What the output head and its loss take: kept for the backward, and while a forward or a backward runs.

model/head.py makes logits of all tokens at once, or by chunks where they are many. On CUDA without chunks the logits
wait in the layers' dtype and become their gradient in place (parallel/vocabulary.py); on CPU with one tensor-parallel
rank torch's own cross-entropy keeps them as log-probabilities in float32.
"""

from collections.abc import Iterator

from megatron_deepseek.planning.activations import Kept, LayerShapes
from megatron_deepseek.planning.numbers import INDEX

LOGITS_BYTES = 256 * 2**20  # model/head.py's; a test holds them equal
ROWS = 128


def default_chunk(rows: int, element: int) -> int:
    """Return how many tokens' logits of `rows` ids are made at once if nobody says (model/head.py)."""
    most = max(1, LOGITS_BYTES // (rows * element))
    return most // ROWS * ROWS or most


def chunk_of(shapes: LayerShapes, asked: int | None) -> int | None:
    """Return the tokens of a chunk, None where all are one."""
    chunk = asked or default_chunk(shapes.model.vocab_size // shapes.layout.tp, shapes.numbers.element)
    return chunk if chunk < shapes.whole else None


def head(shapes: LayerShapes, chunk: int | None, predictions: int) -> Iterator[Kept]:
    """Yield what one prediction's head keeps; `chunk` is `chunk_of`'s, `predictions` how many the model makes."""
    model, numbers, layout, tokens = shapes.model, shapes.numbers, shapes.layout, shapes.whole
    vocabulary = model.vocab_size // layout.tp
    if layout.tp > 1 and layout.sequence_parallel:
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
        yield Kept("statistics of logits", 2 * tokens * numbers.wide)


def head_forward(shapes: LayerShapes, chunk: int | None, fused: bool) -> float:
    """Return the bytes that exist only while a prediction's loss is made: a chunk's logits and what is made of them."""
    vocabulary, tokens = shapes.model.vocab_size // shapes.layout.tp, min(chunk or shapes.whole, shapes.whole)
    own, wide = shapes.numbers.plain(tokens, vocabulary), tokens * vocabulary * shapes.numbers.wide
    if chunk is not None:
        return own + (0 if shapes.numbers.cuda else wide)
    return 0.0 if fused else wide


def head_backward(shapes: LayerShapes, chunk: int | None, fused: bool) -> float:
    """Return the bytes that exist only while a prediction's backward runs: gradients of logits and of the weight."""
    model, numbers = shapes.model, shapes.numbers
    vocabulary, tokens = model.vocab_size // shapes.layout.tp, min(chunk or shapes.whole, shapes.whole)
    weight = numbers.plain(vocabulary, model.hidden_size)
    logits = numbers.plain(tokens, vocabulary)
    wide = 0.0 if fused and numbers.cuda else tokens * vocabulary * numbers.wide
    return weight + numbers.plain(shapes.whole, model.hidden_size) + wide + (logits if chunk is not None else 0.0)
