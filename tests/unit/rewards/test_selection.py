"""Which answers are kept, and the reason of each that is not, by hand."""

import json

import pytest

from megatron_deepseek.rewards.selection import (
    ALL, BEST, CALL, DUPLICATE, LANGUAGE, LOW_REWARD, NO_ANSWER, NO_REWARD, NOT_KEPT, QUESTION, REPETITION, TOO_LONG,
    UNFINISHED, Candidate, Filters, Tally, verdicts)


def answer(content="seven", reasoning=None, tokens=5, finished=True, calls=False) -> Candidate:
    return Candidate(reasoning, content, tokens, finished, calls)


@pytest.mark.parametrize("candidate, filters, reason", [
    (answer(), Filters(), None), (answer(finished=False), Filters(), UNFINISHED),
    (answer(tokens=5), Filters(longest=5), None), (answer(tokens=6), Filters(longest=5), TOO_LONG),
    (answer(calls=True, content=""), Filters(), CALL), (answer(" \n", "thoughts"), Filters(), NO_ANSWER),
    (answer("a b c d " * 9), Filters(), REPETITION), (answer("a b c d " * 9), Filters(repetition=1), None),
    (answer("x", "a b c d " * 9), Filters(), REPETITION), (answer("sieben 七"), Filters(language="zh"), LANGUAGE),
    (answer("七"), Filters(language="zh"), None), (answer("七"), Filters(language=QUESTION), LANGUAGE),
    (answer("seven", "七七七七七"), Filters(language=QUESTION), LANGUAGE),
    (answer("seven 七"), Filters(language=QUESTION, language_share=0.8), None),
    (answer("seven 七"), Filters(), None)])
def test_filters(candidate, filters, reason):
    assert verdicts("What is 3 + 4?", [candidate], [None], filters) == [reason]


def test_a_question_without_letters_has_no_language():
    assert verdicts("3 + 4 = ?", [answer("七")], [None], Filters(language=QUESTION)) == [None]


@pytest.mark.parametrize("totals, keep, reasons", [
    ([1, 0.5, None, 2], ALL, [None, LOW_REWARD, NO_REWARD, None]),
    ([1, 0.5, None, 2], BEST, [NOT_KEPT, LOW_REWARD, NO_REWARD, None]),
    ([2, 2, 3, 1], 2, [None, NOT_KEPT, None, NOT_KEPT]), ([2, 2, 2, 2], 1, [None, NOT_KEPT, NOT_KEPT, NOT_KEPT]),
    ([0, 0, 0, 0], 3, [LOW_REWARD] * 4)])
def test_rewards_and_what_is_kept(totals, keep, reasons):
    candidates = [answer(content) for content in "abcd"]
    assert verdicts("q", candidates, totals, Filters(accept_at=1.0, keep=keep)) == reasons


def test_the_first_of_equal_answers_counts():
    """Whatever became of it: the second of two with one reward has the same."""
    candidates = [answer("a"), answer("a", "because"), answer("a"), answer("b"), answer("a", "because")]
    assert verdicts("q", candidates, [1] * 5, Filters(accept_at=1.0)) == [None, None, DUPLICATE, None, DUPLICATE]


def test_without_rewards_nothing_is_too_low():
    assert verdicts("q", [answer("a"), answer("b")], [None, None], Filters(keep=BEST)) == [None, NOT_KEPT]


def test_the_tally_adds_up():
    tally = Tally()
    tally.unusable["missing field"] += 2
    tally.add([answer("a"), answer("b", tokens=9)], [None, LOW_REWARD])
    tally.add([answer("c"), answer("d")], [None, NOT_KEPT])
    tally.add([answer("e", finished=False)], [UNFINISHED])
    tally.add_rewards("math", [1.0, 0.0], {})
    tally.add_rewards("math", [1.0, None], {"timed out": 1})
    record = tally.record()
    assert json.loads(json.dumps(record)) == record == {
        "prompts": 3, "unusable_prompts": {"missing field": 2}, "answers": 5, "kept": 2,
        "rejected": {UNFINISHED: 1, LOW_REWARD: 1, NOT_KEPT: 1},
        "prompts_by_accepted_answers": {"none": 1, "some": 1, "all": 1}, "tokens": 29, "kept_tokens": 10,
        "rewards": {"math": {"mean": 2 / 3, "without_value": 1, "failures": {"timed out": 1}}}}
    assert record["answers"] == record["kept"] + sum(record["rejected"].values())
    lines = "\n".join(tally.lines())
    assert "5 answers to 3 prompts, 29 tokens" in lines and "kept                         2    40.0%" in lines
    assert "prompts not asked: 2 (missing field)" in lines
    assert "reward math: mean 0.6667, 1 without a value, 1 timed out" in lines
