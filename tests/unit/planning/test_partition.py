"""The exact program that cuts a model into stages, against all cuts of small ones."""

import random
from itertools import combinations

import pytest

from megatron_deepseek.parallel.schedule_rules import stages_of_rank
from megatron_deepseek.planning.partition import Pipeline, partition


def ranks_of(pipeline, bounds):
    count = pipeline.pp * pipeline.virtual
    return [tuple(bounds[stage] for stage in stages_of_rank(rank, count, pipeline.pp, pipeline.schedule))
            for rank in range(pipeline.pp)]


def value(pipeline, bounds):
    """Return what is minimised: the busiest rank, then the squares of stages; None where a rank has no room."""
    ranks = ranks_of(pipeline, bounds)
    if not all(pipeline.fits(rank, each) for rank, each in enumerate(ranks)):
        return None
    squares = sum(sum(pipeline.part_seconds[first:end]) ** 2 for first, end in bounds)
    return max(pipeline.seconds(rank, each) for rank, each in enumerate(ranks)), squares


def best_of_all(pipeline):
    count = pipeline.pp * pipeline.virtual
    cuts = ((0, *each, pipeline.parts) for each in combinations(range(1, pipeline.parts), count - 1))
    found = [value(pipeline, tuple(zip(cut, cut[1:]))) for cut in cuts]
    return min((each for each in found if each is not None), default=None)


def pipeline_of(cost, room, pp, virtual, schedule, limit):
    def total(numbers, bounds):
        return sum(sum(numbers[first:end]) for first, end in bounds)

    return Pipeline(tuple(map(float, cost)), pp, virtual, schedule, lambda rank, each: float(total(cost, each)),
                    lambda rank, each: total(room, each) * (1 + 0.3 * (pp - rank)) <= limit, sum(cost) / pp)


@pytest.mark.parametrize("virtual, schedule", [(1, "1F1B"), (2, "DualPipeV"), (2, "ZBVZeroBubble"),
                                               (2, "Interleaved1F1B")])
def test_no_cut_is_better(virtual, schedule):
    chance, looked, without = random.Random(0), 0, 0
    while looked < 60:
        parts, pp = chance.randint(6, 10), chance.randint(2, 3)
        if pp * virtual > parts:
            continue
        looked += 1
        pipeline = pipeline_of([chance.choice([1, 2, 3, 5]) for _ in range(parts)],
                               [chance.choice([1, 2]) for _ in range(parts)], pp, virtual, schedule,
                               chance.choice([6, 9, 12, 100]))
        expected, found = best_of_all(pipeline), partition(pipeline)
        if expected is None or expected[0] > 1.4 * pipeline.least:  # beyond that nothing is looked for
            without += 1
            assert found is None
        else:
            assert value(pipeline, found) == pytest.approx(expected)
    assert 0 < without < looked


def test_first_rank_takes_less_where_it_has_less_room():
    """1F1B's first rank keeps most micro-batches: with room for 3 layers there, the others take one more."""
    pipeline = Pipeline((1.0,) * 16, 4, 1, "1F1B", lambda rank, each: float(each[0][1] - each[0][0]),
                        lambda rank, each: (each[0][1] - each[0][0]) * (4 - rank) <= 12, 4.0)
    assert [end - first for first, end in partition(pipeline)] == [3, 4, 4, 5]


def test_loops_of_more_stages_are_even():
    pipeline = Pipeline((1.0,) * 26, 2, 4, "Interleaved1F1B", lambda rank, each: sum(b - a for a, b in each) * 1.0,
                        lambda rank, each: True, 13.0)
    sizes = sorted(end - first for first, end in partition(pipeline))
    assert sizes == [3] * 6 + [4] * 2
