"""Rolling windows over a text that is longer than a model sees at once: each token is predicted once.

    tokens  0 1 2 3 4 5 6 7 8 9    prefix B, max_length 4
    stride 4:  B 0 1 2 -> 0 1 2 3      3 4 5 6 -> 4 5 6 7      5 6 7 8 -> 8 9
    stride 2:  B 0 1 2 -> 0 1 2 3      1 2 3 4 -> . . 4 5      3 4 5 6 -> . . 6 7 ...

With a stride of max_length, lm-eval's `loglikelihood_rolling`, windows do not overlap but for the last one, and a token
has half a window before it on average. A smaller stride gives every token at least max_length - stride + 1 tokens of
context, for as many times the work.
"""

from collections.abc import Iterator, Sequence

from megatron_deepseek.evaluation.questions import Continuation


def rolling_windows(tokens: Sequence[int], prefix: int, max_length: int, stride: int) -> Iterator[Continuation]:
    """Yield the windows of a text, of which each predicts at most `stride` tokens, the first one `max_length`.

    Raise ValueError for a stride below 1 or above `max_length`.
    """
    if not 1 <= stride <= max_length:
        raise ValueError(f"the stride {stride} is not between 1 and the {max_length} tokens of a window")
    known = (prefix, *tokens)
    predicted = 0
    while predicted < len(tokens):
        number = min(stride if predicted else max_length, len(tokens) - predicted)
        end = predicted + number
        begin = max(0, end - max_length)
        yield Continuation(known[begin:predicted + 1], known[predicted + 1:end + 1])
        predicted = end
