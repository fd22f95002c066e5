"""A model in training that is asked: on any layout what one process says, and the training goes on as if it was not."""

from functools import cache

import pytest
from cases import Case
from rows_job import QUESTIONS, answered

from megatron_deepseek.evaluation.questions import Score

CASES = [Case(pp=2, schedule="1F1B", mtp=1, microbatches=3)]
CASES += [pytest.param(case, marks=pytest.mark.slow) for case in (
    Case(dp=2), Case(tp=2, sp=True), Case(cp=2, cp_type="ring"), Case(tp=2, dp=2, ep=2, dispatcher="alltoall"),
    Case(pp=2, schedule="ZBVZeroBubble", virtual=2, dp=2, microbatches=5),
    Case(pp=2, schedule="1F1B", cp=2, cp_type="ring", microbatches=3))]


@pytest.fixture(scope="module")
def alone(ranks):
    """What one process says of a case's model, whose weights the layout does not change."""
    return cache(lambda case: ranks.run(1, answered, case, QUESTIONS, True)[0][0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_answers_are_those_of_one_process(ranks, alone, case):
    """Sums of float64 in another order move a log-probability by 1e-13 or so; a mistake moves it by 1e-3."""
    (found, steps), *others = ranks.run(case.layout.world_size, answered, case)
    assert not any(answers for answers, _ in others)
    for ours, theirs, question in zip(found, alone(case), QUESTIONS, strict=True):
        if isinstance(theirs, Score):
            assert ours.log_probability == pytest.approx(theirs.log_probability, rel=1e-9)
            assert ours.greedy == theirs.greedy
        else:
            assert ours == theirs and len(ours[0]) == min(question.parameters.max_tokens, 8 - len(question.prompt))
    unasked = ranks.run(case.layout.world_size, answered, case, ())[0][1]
    assert steps == unasked
