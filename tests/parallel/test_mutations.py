"""The comparison with one process sees mistakes: each of a table, made on purpose, must make it fail."""

import pytest
from compare import differences
from job import run_case, run_reference
from mutations import MUTATIONS, run_mutated

CASES = tuple(dict.fromkeys(mutation.case for mutation in MUTATIONS.values()))


@pytest.fixture(scope="module")
def reference(ranks):
    references = dict.fromkeys(case.reference for case in CASES)
    return {reference: ranks.run(1, run_reference, reference, 1)[0] for reference in references}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_a_mistake_nothing_differs(ranks, reference, case):
    records = ranks.run(case.layout.world_size, run_case, case, 1)
    assert not differences(records, reference[case.reference])


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_is_seen(ranks, reference, name):
    """A thousand times the tolerance, so that a comparison that only rounds differently would not pass for one."""
    case = MUTATIONS[name].case
    records = ranks.run(case.layout.world_size, run_mutated, name)
    assert differences(records, reference[case.reference], tolerance=1e-6)
