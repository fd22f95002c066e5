"""How many tokens each expert gets in a dry run, which computes no router: drawn from a distribution, or even.

Every rank of a layer is taken to send its tokens alike: each expert gets the same share of every rank's copies, in
every micro-batch. So the counts of all ranks fit together, and a forward that is recomputed sees the counts again.

Shapes: T tokens of this rank, K choices of each, E experts, r expert ranks, e = E/r local experts, s ranks that share
each expert (ETP), N nodes, n experts of a node.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch

from megatron_deepseek.parallel.expert import Dispatcher, Route
from megatron_deepseek.parallel.expert_gather import AllGatherDispatcher
from megatron_deepseek.parallel.expert_grouped import GroupedDispatcher

BALANCED, ZIPF = "balanced", "zipf"
DISTRIBUTIONS = (BALANCED, ZIPF)
Shares = Sequence[float]  # of each expert in all copies


def shares(distribution: str, num_experts: int, seed: int) -> Shares:
    """Return each expert's share of the copies, which sum to 1. With `zipf` the k-th most popular gets 1/k of what the
    first one gets; which expert that is, is drawn by `seed`.
    """
    if distribution == BALANCED:
        return [1 / num_experts] * num_experts
    weights = [1 / rank for rank in range(1, num_experts + 1)]
    random.Random(seed).shuffle(weights)
    return [weight / sum(weights) for weight in weights]


def divide(total: int, parts: Shares, most: int) -> list[int]:
    """Return whole numbers that sum to `total`, as near to its `parts` as can be, and none above `most`."""
    exact = [total * part for part in parts]
    counts = [min(int(each), most) for each in exact]
    order = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    while missing := total - sum(counts):
        room = [i for i in order if counts[i] < most][:missing]
        assert room, (total, most, len(parts))
        for i in room:
            counts[i] += 1
    return counts


@dataclass(frozen=True)
class Loads:
    """The tokens of a layer's micro-batch as its dispatcher counts them.

    `shares` of the copies are each expert's. A token has copies on `nodes` of the nodes, on average. `unrouted`: how
    many of this rank's tokens go to no expert (the last ones of a sequence in an MTP module). `capacity`: an expert
    gets at most so many times the mean, None for no limit. `sharing`: the ranks that share each expert.
    """

    shares: Shares
    nodes: float = 1.0
    unrouted: int = 0
    capacity: float | None = None
    sharing: int = 1

    def copies(self, tokens: int, choices: int) -> list[int]:
        """Return the copies that each expert gets of `tokens` tokens: a token has no two on the same expert."""
        counts = divide(tokens * choices, self.shares, tokens)
        if self.capacity is None:
            return counts
        limit = ceil(self.capacity * tokens * choices / len(counts))
        return [min(count, limit) for count in counts]


def _instead(counts: list[list], read: Callable) -> list[list]:
    """Return `counts`; what `read` would copy to the host stays as long as it does in a run."""
    return counts


@dataclass(frozen=True)
class DrawnRoutes:
    """A dispatcher whose host reads drawn counts; all else is done by `dispatcher`."""

    dispatcher: Dispatcher
    loads: Loads

    def __getattr__(self, name: str):
        return getattr(self.dispatcher, name)

    def route(self, experts_TK: torch.Tensor) -> Route:
        route = self.dispatcher.route(experts_TK)
        return replace(route, read=partial(_instead, self.counts(*experts_TK.shape), route.read))

    def __call__(self, *args):
        return self.dispatcher(*args)

    def counts(self, tokens: int, choices: int) -> list[list]:
        """Return what the dispatcher's `route` begins to read, of a rank with `tokens` tokens of `choices` experts."""
        own = self.loads.copies(tokens - self.loads.unrouted, choices)
        others = self.loads.copies(tokens, choices)
        ranks, rank = self.mesh.size(), self.mesh.get_local_rank()
        each = len(own) // ranks
        here = slice(rank * each, (rank + 1) * each)
        sharing = self.loads.sharing
        served = [own_count + (ranks - 1) * count for own_count, count in zip(own[here], others[here])]
        if isinstance(self.dispatcher, GroupedDispatcher):
            return self._of_nodes(tokens, own, others, [served] * sharing)
        if ranks == 1 or isinstance(self.dispatcher, AllGatherDispatcher):
            return [served, [served] * sharing]
        incoming = [own[here] if source == rank else others[here] for source in range(ranks)]
        return [own, incoming, [served] * sharing]

    def _of_nodes(self, tokens: int, own: list[int], others: list[int], served: list[list[int]]) -> list[list]:
        """Return what is read with two levels: a rank sends a token once to each node that it needs."""
        across, within = self.levels.across, self.levels.within
        nodes, places, node, place = across.size(), within.size(), across.get_local_rank(), within.get_local_rank()
        each = len(own) // nodes
        on_node, local = slice(node * each, (node + 1) * each), each // places
        mine = slice(on_node.start + place * local, on_node.start + (place + 1) * local)

        def to_nodes(tokens: int, counts: list[int]) -> list[int]:
            of_node = [sum(counts[start:start + each]) for start in range(0, len(counts), each)]
            wanted = round(tokens * self.loads.nodes)
            return [min(tokens, copies, max(1, round(wanted * copies / max(1, sum(of_node))))) for copies in of_node]

        to_each, from_each = to_nodes(tokens - self.loads.unrouted, own), to_nodes(tokens, others)[node]
        rows = [to_each[node] if source == node else from_each for source in range(nodes)]
        copies = [a + (nodes - 1) * b for a, b in zip(own[on_node], others[on_node])]
        of_place = copies[place * local:(place + 1) * local]
        incoming = [of_place if source == place else [nodes * count for count in others[mine]]
                    for source in range(places)]
        total = [sum(counts) for counts in zip(*incoming)]
        return [to_each, rows, copies, incoming, [total] * len(served)]
