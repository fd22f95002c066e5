"""Rolling windows by hand; tests/clients/test_evaluate.py holds them against lm-eval's own."""

import pytest

from megatron_deepseek.evaluation.questions import Continuation, cut_to
from megatron_deepseek.evaluation.windows import rolling_windows

B = 99


def windows(length: int, max_length: int, stride: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(each.context, each.text) for each in rolling_windows(range(length), B, max_length, stride)]


def test_windows_that_do_not_overlap_but_for_the_last():
    assert windows(10, 4, 4) == [((B,), (0, 1, 2, 3)), ((3,), (4, 5, 6, 7)), ((5, 6, 7), (8, 9))]


def test_a_stride_gives_context():
    assert windows(7, 4, 2) == [((B,), (0, 1, 2, 3)), ((1, 2, 3), (4, 5)), ((2, 3, 4, 5), (6,))]


def test_a_text_that_fits_is_one_window():
    assert windows(3, 4, 1) == [((B,), (0, 1, 2))] and windows(4, 4, 4) == [((B,), (0, 1, 2, 3))]
    assert windows(0, 4, 4) == []


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 5, 6, 17])
def test_each_token_is_predicted_once_after_those_before_it(length, stride):
    """And with at least max_length - stride + 1 tokens before it, where there are as many."""
    tokens, seen = (B, *range(length)), []
    for window in rolling_windows(range(length), B, 5, stride):
        assert len(window.tokens) <= 5 + 1
        begin = len(seen) + 1 - len(window.context)
        assert window.tokens == tokens[begin:begin + len(window.tokens)]
        assert len(window.context) >= min(5 - stride + 1, len(seen) + 1)
        seen += window.text
    assert seen == [*range(length)]


def test_a_stride_that_cannot_be():
    for stride in (0, 5):
        with pytest.raises(ValueError, match=f"the stride {stride} is not between 1 and the 4 tokens"):
            windows(3, 4, stride)


def test_what_is_too_long_loses_its_beginning():
    question = Continuation((1, 2, 3), (4, 5))
    assert cut_to(question, 4) is question and cut_to(question, 3) == Continuation((2, 3), (4, 5))
    assert cut_to(question, 2) == Continuation((3,), (4, 5))
    with pytest.raises(ValueError, match="a text of 2 tokens is to be scored at once, and the model sees 1"):
        cut_to(question, 1)
