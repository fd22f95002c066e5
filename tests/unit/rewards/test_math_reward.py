"""The reward `math`: pairs of right answers and answers, by math-verify. It is left out where that is not installed."""

import threading

import pytest

pytest.importorskip("math_verify")

from megatron_deepseek.rewards.mathematics import math_reward, parse_right
from megatron_deepseek.rewards.spec import parse_rewards
from megatron_deepseek.rewards.workers import RewardWorkers

PAIRS = [
    ("72", "The answer is 72.", 1), ("72", "The answer is 71.", 0), ("72", "<think>72</think>so 71", 0),
    ("72", "<think>71</think>so $72$", 1), ("72", "<think>72 without an end", 0), (r"\frac12", r"\boxed{0.5}", 1),
    (r"$\frac{1}{2}$", r"\boxed{0.5}", 1), (r"10\%", "$0.1$", 1), ("1<x<2", "$(1,2)$", 1), ("1<x<2", "1", 0),
    ("(1,2)", "$1<x<2$", 0), ("x^2+1", "$1+x^2$", 1), (r"\{1,2\}", r"\boxed{\{2, 1\}}", 1), ("1,000", "1000", 1),
    ("A", r"\boxed{A}", 1), ("A", r"\boxed{B}", 0), ("48/2 = 24 in May.\n#### 72", r"\boxed{72}", 1),
    ("So it is 1 or 2.\n#### \\frac12", r"\boxed{0.5}", 1),
    (r"So it is \boxed{3}", "3", 1), ("Paris", "Paris", None), ("", "1", None), (5, "5", 1),
    (r"\$18.90", r"$\boxed{\$18.90}$", 1), ("$18", r"\boxed{18}", 1), ("(C)", r"\boxed{C}", 1),
    (r"\text{Friday}", r"\boxed{\text{Friday}}", 1), (r"5 \text{ cm}", "5", 1), (r"3\frac{1}{2}", r"\boxed{3.5}", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"$\boxed{\begin{pmatrix}1\\2\end{pmatrix}}$", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"$\boxed{\begin{pmatrix}2\\1\end{pmatrix}}$", 0),
    ("y = 2x + 1", r"\boxed{2x+1}", 1), ("(3,4)", r"\boxed{(4,3)}", 0),
    (r"\left( 3, \frac{\pi}{2} \right)", "$(3,\\pi/2)$", 1),
    (r"120^\circ", r"\boxed{120}", 1), ("10", r"\boxed{10}, not 11", 1)]


@pytest.mark.parametrize("right, answer, value", PAIRS)
def test_pairs(right, answer, value):
    assert math_reward(["q"], [answer], [{"answer": right}]) == [value]


def test_a_column_of_ones_own_and_rows_without_an_answer():
    rows = [{"final": "3", "answer": "4"}, {"answer": "3"}]
    assert math_reward(["q"] * 2, ["3", "3"], rows, answer="final") == [1, None]


def test_what_cannot_be_parsed_is_no_right_answer():
    assert parse_right("no number here") == [] and parse_right("twelve") == []


def test_outside_the_main_thread_it_scores_alike():
    """Where math-verify's own time-outs would make every score 0."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(math_reward(["q"], ["72"], [{"answer": "72"}])))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_in_workers_by_parts():
    rights, answers, values = zip(*PAIRS)
    with RewardWorkers(parse_rewards(["math:2"]), seconds=60, processes=2) as workers:
        found = workers.score(["q"] * len(PAIRS), answers, [{"answer": each} for each in rights])
    assert found.values["math"] == list(values) and found.failures == {}
    assert found.total == [None if each is None else 2 * each for each in values]
