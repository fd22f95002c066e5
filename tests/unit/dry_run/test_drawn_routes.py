"""The counts of a dry run's experts: whole numbers that sum up, and what one rank sends is what another one gets."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from megatron_deepseek.dry_run.routing import BALANCED, ZIPF, DrawnRoutes, Loads, divide, shares
from megatron_deepseek.parallel.expert_gather import AllGatherDispatcher
from megatron_deepseek.parallel.expert_grouped import GroupedDispatcher

EXPERTS, TOKENS, CHOICES = 8, 12, 2


@dataclass
class Mesh:
    """As much of a mesh as the counts need."""

    ranks: int
    rank: int

    def size(self):
        return self.ranks

    def get_local_rank(self):
        return self.rank


def test_parts_are_whole_and_none_is_above_the_most():
    assert divide(10, [0.5, 0.25, 0.25], 10) == [5, 3, 2]
    assert divide(10, [0.9, 0.1, 0.0], 4) == [4, 4, 2]  # no token chooses an expert twice


def test_zipf_gives_the_kth_a_kth_of_the_first_ones_share():
    found = sorted(shares(ZIPF, 4, seed=0), reverse=True)
    assert found == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    assert shares(ZIPF, 64, seed=0) != shares(ZIPF, 64, seed=1)  # another layer has other favourites


def counts(kind, rank: int, ranks: int, distribution: str, **more) -> list[list]:
    dispatcher = object.__new__(kind) if kind is not None else SimpleNamespace()
    object.__setattr__(dispatcher, "mesh", Mesh(ranks, rank))
    for name, value in more.items():
        object.__setattr__(dispatcher, name, value)
    loads = Loads(shares(distribution, EXPERTS, seed=3), nodes=1.5)
    return DrawnRoutes(dispatcher, loads).counts(TOKENS, CHOICES)


@pytest.mark.parametrize("distribution", (BALANCED, ZIPF))
def test_what_a_rank_sends_is_what_the_other_gets(distribution):
    of_ranks = [counts(None, rank, 4, distribution) for rank in range(4)]
    for sender, (outgoing, _, _) in enumerate(of_ranks):
        assert sum(outgoing) == TOKENS * CHOICES
        for receiver, (_, incoming, (served,)) in enumerate(of_ranks):
            assert incoming[sender] == outgoing[2 * receiver:2 * receiver + 2]
            assert served == [sum(rows) for rows in zip(*incoming)]


@pytest.mark.parametrize("distribution", (BALANCED, ZIPF))
def test_gathered_tokens_are_served_once(distribution):
    served = [counts(AllGatherDispatcher, rank, 4, distribution)[0] for rank in range(4)]
    assert sum(map(sum, served)) == 4 * TOKENS * CHOICES


@pytest.mark.parametrize("distribution", (BALANCED, ZIPF))
def test_two_levels_agree(distribution):
    """4 ranks on 2 nodes: a token goes once to each node that it needs, and its copies are fanned out there."""
    of_ranks = {(node, place): counts(GroupedDispatcher, 2 * node + place, 4, distribution, levels=SimpleNamespace(
        across=Mesh(2, node), within=Mesh(2, place))) for node in range(2) for place in range(2)}
    for (node, place), (to_nodes, rows, copies, incoming, (served,)) in of_ranks.items():
        for other in range(2):
            assert of_ranks[other, place][1][node] == to_nodes[other] <= TOKENS
            outgoing = of_ranks[node, other][2]
            assert incoming[other] == outgoing[2 * place:2 * place + 2]
        assert sum(rows) <= sum(copies)  # a token has a copy where it is sent
        assert served == [sum(rows) for rows in zip(*incoming)]
    assert sum(sum(each[4][0]) for each in of_ranks.values()) == 4 * TOKENS * CHOICES
