"""What each collective of a step sends, counted on every rank, beside the least (docs/benchmarks.md has the table)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import Case, covering_cases
from collective_bytes import (
    COUNTS,
    GATHERED,
    REDUCED,
    REGIONS,
    REPLICATED,
    RING,
    SHOWN,
    STAGES,
    TOKENS,
    VOCABULARY,
    Sent,
    TokenBytes,
    least,
    least_of_weights,
    of_all_ranks,
    replicated_bytes,
    sent_in_a_step,
    table,
    token_bytes,
)

PADDING = 1.1  # of the rows of a weight that do not divide among data ranks; weights are small here

QUICK = SHOWN[0], SHOWN[2]
CASES = [pytest.param(case, id=str(case), marks=() if case in QUICK else pytest.mark.slow) for case in SHOWN]
# Of which all weights are gathered, and their gradients reduced, once a step.
OF_ARRAY = [case for case in covering_cases()
            if case.lora == "none" and not case.frozen and not case.reshard and case.dp * case.cp > 1]


def assert_weights_travel_once(sent: Sent, case: Case) -> None:
    needed = least_of_weights(case, sent.pp_rank)
    for name in (GATHERED, REDUCED):
        assert needed <= sent.by_purpose[name] <= needed * PADDING, name


@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_the_least(ranks, case):
    """Weights and gradients, latents, hidden states, and sums of the loss: to the byte, but for padding. The gradients
    of weights that all tensor-parallel ranks hold are summed before data ranks divide them, not after.
    """
    for sent in ranks.run(case.layout.world_size, sent_in_a_step, case):
        assert_weights_travel_once(sent, case)
        for name in (REGIONS, RING, VOCABULARY, STAGES):
            assert sent.by_purpose.get(name, 0) == least(case, sent.pp_rank)[name], name
        if case.tp > 1:
            assert sent.by_purpose[REPLICATED] == replicated_bytes(case)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_ARRAY, ids=str)
def test_weights_and_gradients_travel_once(ranks, case):
    """Whatever the schedule, recomputation and micro-batches."""
    for sent in ranks.run(case.layout.world_size, sent_in_a_step, case):
        assert_weights_travel_once(sent, case)


@pytest.mark.parametrize("case", [
    SHOWN[0], pytest.param(SHOWN[3], marks=pytest.mark.slow),
    pytest.param(Case(dp=4, tp=2, ep=4, etp=2, dispatcher="grouped", node=4, microbatches=2), marks=pytest.mark.slow)],
    ids=str)
def test_tokens_travel_once_to_a_node_and_once_for_each_expert_inside(ranks, case):
    """By the experts that tokens chose. With all-to-all, a token whose two experts are on the same other rank is sent
    there twice; the grouped dispatcher sends it to another node once.
    """
    sent = ranks.run(case.layout.world_size, sent_in_a_step, case)
    counted, needed = of_all_ranks(case, sent)[TOKENS]
    assert counted == sum(each.tokens.whole for each in sent)
    assert needed == sum(each.tokens.least for each in sent) < counted < 2 * needed
    choices = sum(each.tokens.choices for each in sent)
    assert sum(each.by_purpose[COUNTS] for each in sent) >= choices and (choices > 0) == (case.dispatcher == "grouped")


@pytest.mark.slow
def test_the_page_has_the_table(ranks):
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text().splitlines()
    assert not [line for line in table(ranks) if line not in page]


def test_bytes_of_tokens_by_hand():
    """Rank 0 of 4, two a node, of 8 experts: a token with experts on its own rank and on the last one, one with both on
    rank 1, and one with both on rank 2. Hidden 16 and weights in float64.
    """
    case, chosen = SHOWN[3], torch.tensor([[0, 7], [2, 3], [4, 5]])
    found = token_bytes(chosen, case, SimpleNamespace(rank=lambda axis: 0))
    across, row = 2, 4 * 16 * 8
    assert found == TokenBytes(row * (across + 1 + 2) + across * 2 * 16, row * (across + 1 + 1) + 16 + 32,
                               across * 2 * 8)
