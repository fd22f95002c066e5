"""The comparison with one process sees mistakes: each of a table, made on purpose, must make it fail."""

import pytest
from compare import differences
from job import run_case, run_reference
from mutations import MUTATIONS, run_mutated

pytestmark = pytest.mark.slow

CASES = tuple(dict.fromkeys(mutation.case for mutation in MUTATIONS.values()))


@pytest.fixture(scope="module")
def reference(ranks):
    """The record of one process, computed once for each model and data."""
    records = {}

    def record(case):
        if case.reference not in records:
            (records[case.reference],) = ranks.run(1, run_reference, case.reference, 1)
        return records[case.reference]

    return record


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_a_mistake_nothing_differs(ranks, reference, case):
    records = ranks.run(case.layout.world_size, run_case, case, 1)
    assert not differences(records, reference(case))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_is_seen(ranks, reference, name):
    """A thousand times the tolerance, so that a comparison that only rounds differently would not pass for one."""
    case = MUTATIONS[name].case
    records = ranks.run(case.layout.world_size, run_mutated, name)
    assert differences(records, reference(case), tolerance=1e-6)
