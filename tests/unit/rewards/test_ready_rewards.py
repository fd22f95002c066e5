"""The ready rewards against hand-worked cases; `math` is in test_math_reward.py."""

import pytest

from megatron_deepseek.rewards.answer import asked_messages, right_answer, split_answer
from megatron_deepseek.rewards.programs import code_reward
from megatron_deepseek.rewards.texts import (
    exact_reward, format_reward, language_reward, length_reward, regex_reward, repetition_reward)
from megatron_deepseek.rewards.words import language_of, language_share, repetition, words

FORCED = "<｜User｜>q<｜Assistant｜><think>\n"


def reward(function, completion: str, row=None, prompt="What?", **options):
    (value,) = function([prompt], [completion], [row or {}], **options)
    return value


@pytest.mark.parametrize("prompt, completion, reasoning, answer", [
    ("q", "just so", None, "just so"),
    ("q", "<think>\na\n</think>\n\nb", "a", "b"),
    (FORCED, "a\n</think>\n\nb", "a", "b"),
    (FORCED, "a without an end", "a without an end", ""),
    ("q", "<think>a without an end", "a without an end", ""),
    ("q", "a</think>b", "a", "b"),
    ("q <think>x</think>", "b", None, "b"),
    (FORCED, "a</think>b</think>c", "a</think>b", "c")])
def test_reasoning_and_answer(prompt, completion, reasoning, answer):
    assert split_answer(prompt, completion) == (reasoning, answer)


@pytest.mark.parametrize("row, column, expected", [
    ({"answer": " 7 ", "solution": "8"}, "", "7"), ({"solution": 8}, "", "8"), ({"answer": 0}, "", "0"),
    ({"answer": "7", "target": "9"}, "target", "9"), ({"answer": "7"}, "target", None), ({}, "", None),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>t</think>9"}]}, "", "9"),
    ({"messages": [{"role": "user", "content": "q"}]}, "", None)])
def test_what_a_row_says_to_be_right(row, column, expected):
    assert right_answer(row, column) == expected


def test_what_a_row_asks():
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert asked_messages({"messages": [asked, said]}) == asked_messages({"prompt": [asked]}) == [asked]
    assert asked_messages({"prompt": "text"}) is None and asked_messages({}) is None


@pytest.mark.parametrize("prompt, completion, value", [
    ("q", "<think>a</think>b", 1), ("q", "<think>\na\n</think>\n\nb", 1), (FORCED, "a</think>b", 1),
    (FORCED, "<think>a</think>b", 0), ("q", "a</think>b", 0), ("q", "b", 0), ("q", "<think>a", 0),
    ("q", "<think>a</think>", 0), ("q", "<think></think>b", 0), ("q", "so <think>a</think>b", 0),
    ("q", "<think>a</think>b</think>c", 0), ("q", "<think>a</think>b<think>c</think>d", 0)])
def test_format(prompt, completion, value):
    assert reward(format_reward, completion, prompt=prompt) == value


@pytest.mark.parametrize("completion, row, options, value", [
    ("<think>8</think> 7\n", {"answer": "7"}, {}, 1), ("7.", {"answer": "7"}, {}, 0), ("7", {}, {}, None),
    ("7", {"target": 7}, {"answer": "target"}, 1), ("<think>7", {"answer": "7"}, {}, 0)])
def test_exact(completion, row, options, value):
    assert reward(exact_reward, completion, row, **options) == value


@pytest.mark.parametrize("length, value", [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1)])
def test_length_is_dapos(length, value):
    """Equation 13 with L_max 100 and L_cache 20."""
    assert reward(length_reward, "x", {"completion_tokens": length}, longest=100, soft=20) == value
    assert reward(length_reward, "x" * length, longest=100, soft=20, unit="characters") == value
    assert reward(length_reward, "x " * length, longest=100, soft=20, unit="words") == value


def test_length_without_a_number_of_tokens_has_no_opinion():
    assert reward(length_reward, "x", longest=1) is None


@pytest.mark.parametrize("text, language, share", [
    ("abcd", "en", 1), ("中文字ab", "zh", 0.6), ("中文字ab", "en", 0.4), ("12 + 3 = 15", "zh", 1), ("", "zh", 1),
    ("答案是 $x^2 + abc$，\\frac 见 `code` ```python\nprint(1)\n```", "zh", 1), ("да да no", "ru", 2 / 3),
    ("これは漢字です", "ja", 1), ("한국 ab", "ko", 0.5)])
def test_share_of_a_script(text, language, share):
    assert language_share(text, language) == pytest.approx(share)


@pytest.mark.parametrize("text, language", [
    ("What is 2 + 2?", "en"), ("二加二是多少?", "zh"), ("これは何の漢字ですか", "ja"), ("Сколько?", "ru"),
    ("2 + 2 = ?", None)])
def test_language_of_a_question(text, language):
    assert language_of(text) == language


def test_language_of_the_question_or_a_given_one():
    assert reward(language_reward, "四 four", prompt="二加二?") == pytest.approx(1 / 5)
    assert reward(language_reward, "四 four", prompt="2+2") is None
    assert reward(language_reward, "四 four", prompt="二加二?", language="en") == pytest.approx(4 / 5)


def test_words_and_repetition():
    """Of "a b c d a b c d", five runs of four words, one is there twice."""
    assert words("Hello, 世界!") == ["hello", ",", "世", "界", "!"]
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5) and repetition("a b c") == 0
    assert repetition("no no " * 100) > 0.95 and repetition("ha" * 200) > 0.8
    assert reward(repetition_reward, "a b a b a b", size=2) == -3 / 5


@pytest.mark.parametrize("completion, row, options, value", [
    ("<think>no</think>the end 12", {}, {"pattern": r"\d+$"}, 1), ("<think>12</think>no", {}, {"pattern": r"\d"}, 0),
    ("abc", {"regex": "^abc$"}, {}, 1), ("abc", {"regex": "^abc$"}, {"pattern": "d"}, 0),
    ("abc", {"own": "d"}, {"column": "own"}, 0), ("abc", {}, {}, None)])
def test_regex(completion, row, options, value):
    assert reward(regex_reward, completion, row, **options) == value


FENCED = "<think>def f</think>Here:\n```python\ndef f(x):\n    return 2 * x\n```\nand\n```text\nno code\n```\n"


@pytest.mark.parametrize("completion, row, value", [
    (FENCED, {"tests": ["assert f(2) == 4", "assert f(0) == 0"]}, 1),
    (FENCED, {"test_list": ["assert f(2) == 5"]}, 0),
    (FENCED, {"tests": "for x in range(3):\n    assert f(x) == x + x"}, 1),
    (FENCED, {"test": "def check(candidate):\n    assert candidate(3) == 6\n", "entry_point": "f"}, 1),
    (FENCED, {"test": "def check(candidate):\n    assert candidate(3) == 7\n", "entry_point": "f"}, 0),
    ("```py\nfirst = 1\n```\n```\nlast = 1\n```", {"tests": ["assert last"]}, 1),
    ("def f(x): return x", {"tests": ["assert f(2) == 2"]}, 1),
    ("exit(0)", {"tests": ["assert False"]}, 0), (FENCED, {}, None)])
def test_code(completion, row, value):
    assert reward(code_reward, completion, row, seconds=20.0, unisolated=True) == value


def test_programs_that_hang_cost_the_others_nothing():
    rows = [{"tests": ["assert True"]}, {"tests": ["while True: pass"]}, {}, {"tests": ["assert True"]}]
    assert code_reward([""] * 4, [""] * 4, rows, seconds=3.0, unisolated=True) == [1, 0, None, 1]
