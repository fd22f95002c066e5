"""The number of nodes that a token's copies go to, and whether limited routing keeps them together as it is meant to.

Experts are divided over the nodes of an expert group in their order, and in the same order into routing groups, of
which a token reaches only some (arXiv 2412.19437, section 2.1.2). The limit on groups is one on nodes if each group
lies on one node, or on whole ones. No torch: --explain-layout says it too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout


@dataclass(frozen=True)
class NodeReach:
    """How far the tokens of an expert group on `num_nodes` nodes travel.

    `most`: to how many of the nodes one token goes at most. `aligned`: whether each routing group lies on one node, or
    on whole nodes.
    """

    num_nodes: int
    most: int
    aligned: bool


def node_reach(model: ModelConfig, layout: Layout, ranks_per_node: int) -> NodeReach:
    """Return the reach of a model's tokens; where nodes divide expert groups unevenly, `most` is an upper bound."""
    num_nodes = nodes_of_experts(layout, ranks_per_node)
    groups = model.n_group
    first = [group * num_nodes // groups for group in range(groups)]
    behind = [-(-(group + 1) * num_nodes // groups) for group in range(groups)]
    spans = sorted((stop - start for start, stop in zip(first, behind)), reverse=True)
    kept = groups if model.topk_method == "greedy" else model.topk_group
    aligned = groups % num_nodes == 0 or num_nodes % groups == 0
    return NodeReach(num_nodes, min(num_nodes, model.num_experts_per_tok, sum(spans[:kept])), aligned)


def nodes_of_experts(layout: Layout, ranks_per_node: int) -> int:
    """Return over how many nodes an expert group is spread."""
    return max(1, -(-layout.ep * layout.etp // ranks_per_node))


def expected_nodes(model: ModelConfig, layout: Layout, ranks_per_node: int, by_position: bool = False) -> float:
    """Return on how many nodes a token's experts are on average, if all experts are as likely and groups lie on whole
    nodes: of V3 on 8 nodes 4 (1 - C(96, 8) / C(128, 8)) = 3.63 of the 4 groups that it reaches. `by_position`: experts
    are chosen by forced balance (model/router.py), groups that follow each other.
    """
    nodes = nodes_of_experts(layout, ranks_per_node)
    if not model.n_routed_experts or nodes == 1:
        return 1.0
    groups, chosen = model.n_group, model.num_experts_per_tok
    kept = groups if model.topk_method == "greedy" else model.topk_group
    if by_position and nodes <= groups:
        reached = [{(first + k) % groups * nodes // groups for k in range(min(model.topk_group, chosen))}
                   for first in range(groups)]
        return sum(map(len, reached)) / groups
    each = model.n_routed_experts // groups
    if nodes > groups:  # a group lies on several nodes
        share = max(1, model.n_routed_experts // nodes)
        return kept * each // share * (1 - _none_of(kept * each, share, chosen))
    own = groups // nodes  # groups of a node, of which some are among those that a token keeps
    missed = sum(comb(own, kept_here) * comb(groups - own, kept - kept_here) / comb(groups, kept)
                 * _none_of(kept * each, kept_here * each, chosen) for kept_here in range(min(own, kept) + 1))
    return nodes * (1 - missed)


def _none_of(total: int, part: int, chosen: int) -> float:
    """Return how likely it is that none of `chosen` different ones of `total` is among `part` of them."""
    return comb(max(0, total - part), chosen) / comb(total, chosen)


def describe_reach(model: ModelConfig, layout: Layout, ranks_per_node: int) -> Iterator[str]:
    """Yield lines for the user, none where the expert group has no second node."""
    if not model.n_routed_experts or layout.ep * layout.etp <= ranks_per_node:
        return
    reach = node_reach(model, layout, ranks_per_node)
    yield (f"experts on {reach.num_nodes} nodes of {ranks_per_node} ranks: a token goes to at most {reach.most} of "
           f"them ({model.num_experts_per_tok} experts of {model.topk_group} of {model.n_group} groups)")
    if not reach.aligned:
        yield (f"--moe-router-num-groups {model.n_group} and {reach.num_nodes} nodes are no multiples of each other: "
               f"some routing groups lie across nodes, and limiting groups limits nodes less than it could")
