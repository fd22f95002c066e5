"""What every command says to a mistaken option: one line, the option that was meant, status 2."""

import pytest

from megatron_deepseek.arguments.command_line import proposals
from megatron_deepseek.arguments.parser import build_parser

OPTIONS = [option for option in build_parser()._option_string_actions if option.startswith("--")]


@pytest.mark.parametrize("typed, meant", [
    ("--train-iter", "--train-iters"), ("--train_iters", "--train-iters"), ("--Train-Iters", "--train-iters"),
    ("--tensor-parallel-size", "--tensor-model-parallel-size"), ("--tp", "--tensor-model-parallel-size"),
    ("--learning-rate", "--lr"), ("--batch-size", "--global-batch-size"), ("--warmup-iters", "--lr-warmup-iters"),
    ("--tokenizer", "--tokenizer-model"), ("--resume", "--load"), ("--seq-len", "--seq-length")])
def test_the_option_that_was_meant_is_proposed(typed, meant):
    assert meant in proposals(typed, OPTIONS)


@pytest.mark.parametrize("typed", ["--foo", "--verbose", "--transformer-impl"])
def test_nothing_is_proposed_where_nothing_is_near(typed):
    assert proposals(typed, OPTIONS) == []


def test_unknown_options_are_told_before_missing_ones():
    with pytest.raises(ValueError) as refused:
        build_parser().parse_args("--modle tiny --foo=3 --train-iters 1".split())
    assert str(refused.value) == ("--modle is no option; did you mean --model?; --foo is no option; --help lists "
                                  "them all")


def test_values_with_blanks_and_words_alone_are_no_options():
    with pytest.raises(ValueError, match="unexpected 'one' 'two'"):
        build_parser().parse_args(["--model", "tiny", "--train-iters", "1", "one", "two"])
    assert build_parser().parse_args(["--model", "--my model", "--train-iters", "1"]).model == "--my model"
