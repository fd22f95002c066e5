"""Any layout, schedule and mix of features against one process, in float64."""

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from cases import OPTIONS, SPACE, STORED, WIDE_CASES, Case, cost, covering_cases
from compare import differences
from covering import Space, covering_array, pairs_of
from job import NEVER_CHOSEN, batch, run_case, run_reference

CASES = covering_cases()


@pytest.fixture(scope="session")
def reference(ranks):
    """The record of one process, computed once for each model and data."""
    records = {}

    def record(case: Case):
        if case.reference not in records:
            (records[case.reference],) = ranks.run(1, run_reference, case.reference)
        return records[case.reference]

    return record


# `make test` takes every sixth of them, from where they cost least; `make test-all` all.
ALL = [*CASES, *WIDE_CASES]
FIRST = min(range(6), key=lambda first: sum(cost(vars(case)) for case in ALL[first::6]))
SHOWN = [pytest.param(case, id=str(case), marks=() if number % 6 == FIRST else pytest.mark.slow)
         for number, case in enumerate(ALL)]


@pytest.mark.parametrize("case", SHOWN)
def test_layout_computes_what_one_process_does(ranks, reference, case):
    records = ranks.run(case.layout.world_size, run_case, case)
    assert not differences(records, reference(case))


def test_the_reference_has_the_cases_that_tests_forget(reference):
    """Experts that get no token, a micro-batch and a data rank without labels, uneven numbers of labels."""
    case = Case(dp=2, microbatches=2, micro_batch_size=2)
    counts = reference(case).steps[0].expert_counts["model.layers.1.mlp"].tolist()
    assert [counts[expert] for expert in NEVER_CHOSEN] == [0, 0] and sum(counts) > 0
    limited = [replace(case, capacity=policy) for policy in ("probs", "position")]
    assert all(0.2 < step.dropped < 0.8 for each in limited for step in reference(each).steps)
    labels = [batch(case.model, case.global_batch_size, step)[2].sum(1).tolist() for step in range(3)]
    assert labels[1][:2] == [0, 0] and sum(labels[1]) > 0
    assert labels[2][4:] == [0] * 4 and sum(labels[2]) > 0
    assert len(set(labels[0])) > 2


def test_stored_cases_are_of_these_options_and_constraints():
    assert json.loads(STORED.read_text())["space"] == SPACE.fingerprint(), "run python tests/helpers/ranks/cases.py"


def test_array_covers_every_valid_pair():
    """By another road than the generator's: every pair of every case of a second, random array is in the first."""
    covered = set().union(*({*pairs_of(vars(case))} for case in CASES))
    other = covering_array(SPACE, seed=1, cost=lambda case: 1.0, candidates=1)
    assert set().union(*map(pairs_of, other)) <= covered
    for name, values in OPTIONS.items():
        assert Counter(getattr(case, name) for case in CASES).keys() == set(values), name


def test_covering_array_of_a_space_small_enough_to_enumerate():
    space = Space({"a": (1, 2, 3), "b": (1, 2, 3), "c": (1, 2)}, (lambda a, b: a != b, lambda b, c: b * c < 6))
    valid = [dict(a=a, b=b, c=c) for a in (1, 2, 3) for b in (1, 2, 3) for c in (1, 2) if a != b and b * c < 6]
    array = covering_array(space, seed=0, cost=lambda case: 1.0)
    assert all(case in valid for case in array)
    assert set().union(*map(pairs_of, array)) == set().union(*(set(combinations(c.items(), 2)) for c in valid))
