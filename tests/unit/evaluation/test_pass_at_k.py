"""pass@k: the estimator by hand and by counting, and problems of HumanEval's form in the sandbox."""

import json
from itertools import combinations
from math import isclose

import pytest
from evaluated_models import ArithmeticModel

from megatron_deepseek.evaluation.pass_at_k import complete, judge, pass_at_k, read_problems, summary
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.sandbox.run import Limits

PROBLEMS = [
    {"task_id": "T/0", "prompt": "def add(a, b):\n", "entry_point": "add",
     "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n"},
    {"task_id": "T/1", "prompt": "def twice(a):\n    # doubles a\n", "entry_point": "twice",
     "test": "def check(candidate):\n    assert candidate(4) == 8\n"}]
COMPLETIONS = [["    return a + b", "    return a - b", "    return b + a"],
               ["    return a", "    while True: pass", "    exit(0)"]]


@pytest.mark.parametrize("samples, passed, k, expected", [
    (1, 1, 1, 1.0), (4, 0, 2, 0.0), (4, 1, 2, 1 / 2), (5, 2, 2, 7 / 10), (10, 3, 1, 3 / 10), (10, 8, 3, 1.0),
    (10, 3, 5, 11 / 12)])  # 1 - C(7,5) / C(10,5) = 1 - 21 / 252
def test_the_estimate_by_hand(samples, passed, k, expected):
    assert isclose(pass_at_k(samples, passed, k), expected, rel_tol=1e-12)


def test_the_estimate_is_the_part_of_choices_with_a_program_that_passes():
    for samples in range(1, 8):
        for passed in range(samples + 1):
            for k in range(1, samples + 1):
                chosen = [min(each) < passed for each in combinations(range(samples), k)]
                assert isclose(pass_at_k(samples, passed, k), sum(chosen) / len(chosen), abs_tol=1e-12)


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples of each problem, and there are 2"):
        pass_at_k(2, 1, 3)


@pytest.fixture
def problems(tmp_path):
    (tmp_path / "problems.jsonl").write_text("\n".join(json.dumps(each) for each in PROBLEMS) + "\n\n")
    return read_problems(tmp_path / "problems.jsonl")


def test_programs_are_judged(problems):
    samples = list(judge(problems, COMPLETIONS, Limits(seconds=0.5), workers=2, unisolated=True))
    assert [each.outcome.passed for each in samples] == [True, False, True, False, False, False]
    assert [each.record()["task_id"] for each in samples] == ["T/0"] * 3 + ["T/1"] * 3
    assert [each.record()["result"] for each in samples][3:5] == ["failed: AssertionError", "timed out"]
    assert summary(samples, [1, 2]) == pytest.approx(
        {"problems": 2, "samples": 6, "pass@1": (2 / 3 + 0) / 2, "pass@2": (1 + 0) / 2})


def test_completions_end_at_a_stop_and_each_problem_has_seeds_of_its_own(problems):
    model = ArithmeticModel(max_length=100)
    parameters = SamplingParameters(max_tokens=8, n=2, seed=5, stop=("\n",))
    assert complete(model, problems, parameters) == [[":", ":"], ["a", "a"]]  # of the last two bytes, ":\n" and "a\n"
    assert sorted(each.parameters.seed for each in model.asked) == [5, 7]


def test_a_prompt_without_room_for_an_answer_is_named(problems):
    with pytest.raises(ValueError, match="the problem T/0 has 15 tokens, with 8 of an answer more than the 16"):
        complete(ArithmeticModel(max_length=16), problems, SamplingParameters(max_tokens=8))


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "def f():", "test": ""}', "line 1 has no \"entry_point\""), ("[]", "line 1 holds a list of 0"),
    ("", "has no problem")])
def test_what_is_no_problem_is_named(tmp_path, line, message):
    (tmp_path / "problems.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_problems(tmp_path / "problems.jsonl")
