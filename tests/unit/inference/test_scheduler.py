"""The scheduler without a model: order, budget, admission and who gives way."""

import torch

from megatron_deepseek.inference.blocks import BlockPool
from megatron_deepseek.inference.request import Request, Sequence
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.scheduler import Scheduler
from megatron_deepseek.inference.settings import EngineSettings


def sequence(arrival: int, length: int, index: int = 0, request: Request | None = None) -> Sequence:
    """A request whose tokens differ from those of other arrivals."""
    prompt = tuple(range(100 * arrival, 100 * arrival + length))
    request = request or Request(str(arrival), arrival, prompt, SamplingParameters(), frozenset(), None, 0)
    return Sequence(request, index, list(request.prompt), torch.Generator(), None)


def scheduler(num_blocks: int = 100, **settings) -> Scheduler:
    settings = {"max_length": 16, "block_size": 4, "token_budget": 12} | settings
    return Scheduler(EngineSettings(**settings), BlockPool(num_blocks))


def step(one: Scheduler, tokens: int = 1) -> list[tuple[int, int, int]]:
    """Schedule, and let every sequence whose tokens are computed get `tokens` more: (arrival, begin, length)."""
    spans = one.schedule()
    for span in spans:
        if span.samples:
            for _ in range(tokens):
                span.sequence.append(7)
        one.advance(span.sequence, span.kept)
    return [(span.sequence.request.arrival, span.begin, span.length) for span in spans]


def test_answers_come_first_then_prompts_in_order_of_arrival_as_the_budget_allows():
    one = scheduler()
    for arrival, length in ((2, 9), (1, 5), (3, 6)):
        one.add(sequence(arrival, length))
    assert step(one) == [(1, 0, 5), (2, 0, 7)]
    assert step(one) == [(1, 5, 1), (2, 7, 2), (3, 0, 6)]
    assert step(one) == [(1, 6, 1), (2, 9, 1), (3, 6, 1)]


def test_no_more_run_than_may():
    one = scheduler(max_running=2)
    for arrival in (1, 2, 3):
        one.add(sequence(arrival, 2))
    assert [arrival for arrival, *_ in step(one)] == [1, 2]
    one.remove(one.running[0])
    assert [arrival for arrival, *_ in step(one)] == [2, 3]


def test_a_request_waits_until_there_are_blocks_for_all_of_it_and_those_behind_it_too():
    one = scheduler(num_blocks=4, token_budget=6)
    for arrival, length in ((1, 5), (2, 12), (3, 1)):
        one.add(sequence(arrival, length))
    assert step(one) == [(1, 0, 5)]
    assert step(one) == [(1, 5, 1)]  # two blocks are left, and the second request needs three
    one.remove(one.running[0])
    assert step(one) == [(2, 0, 6)]


def test_the_youngest_gives_up_its_blocks_and_comes_back():
    one = scheduler(num_blocks=5)
    for arrival, length in ((1, 7), (2, 3), (3, 2)):
        one.add(sequence(arrival, length))
    step(one)  # two blocks, one, one; one is left
    step(one)  # the first two have full blocks now
    assert step(one) == [(1, 8, 1), (2, 4, 1)] and one.preemptions == 1
    (third,) = one.waiting
    assert (third.request.arrival, third.num_computed, third.blocks) == (3, 0, []) and third.num_answered == 2
    one.remove(one.running[0])
    assert step(one) == [(2, 5, 1), (3, 0, 4)]


def test_other_answers_wait_for_the_first_and_share_its_blocks():
    one, first = scheduler(token_budget=6), sequence(1, 9)
    second = sequence(1, 9, 1, first.request)
    one.add(second)
    one.add(first)
    assert step(one) == [(1, 0, 6)] and step(one) == [(1, 6, 3)]
    assert step(one) == [(1, 9, 1), (1, 8, 1)]
    assert second.blocks[:2] == first.blocks[:2] and one.pool.used == 4 and one.shared_tokens == 8


def test_drafts_count_for_the_budget_and_have_blocks():
    one = scheduler(token_budget=4, draft_tokens=3)
    made = sequence(1, 2)
    one.add(made)
    step(one)
    assert len(made.blocks) == 2  # for two tokens and three drafts
    made.drafts = [7, 7, 7]
    assert step(one, tokens=3) == [(1, 2, 4)] and made.num_computed == 5
