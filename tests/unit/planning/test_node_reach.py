"""To how many nodes a token goes, by hand, and against every choice of groups."""

from dataclasses import replace
from itertools import combinations

import pytest

from megatron_deepseek.model.architecture.presets import V2_LITE, V3
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.planning.node_reach import describe_reach, node_reach


@pytest.mark.parametrize("layout, ranks_per_node, nodes, most, aligned", [
    (Layout(dp=64, ep=64), 8, 8, 4, True),        # V3's own: a group on each node, 4 of 8 kept
    (Layout(dp=32, ep=32), 8, 4, 4, True),        # two groups on each node: 4 groups may be on 4
    (Layout(dp=16, ep=16), 8, 2, 2, True),
    (Layout(dp=128, ep=128), 8, 16, 8, True),     # a group over two nodes: 8, all the experts that a token has
    (Layout(dp=64, ep=32, etp=2), 8, 8, 4, True),  # slices of an expert stay on its node
    (Layout(dp=48, ep=48), 8, 6, 6, False),       # groups of 32 experts, nodes of 42.7
    (Layout(dp=8, ep=8), 8, 1, 1, True)])
def test_deepseek_v3(layout, ranks_per_node, nodes, most, aligned):
    reach = node_reach(V3, layout, ranks_per_node)
    assert (reach.num_nodes, reach.most, reach.aligned) == (nodes, most, aligned)


@pytest.mark.parametrize("num_nodes", [2, 4, 8, 16])
@pytest.mark.parametrize("groups, kept", [(8, 4), (8, 1), (4, 2), (2, 1), (16, 3)])
def test_no_choice_of_groups_reaches_more(groups, kept, num_nodes):
    """Nodes of the experts of any `kept` groups, of 16 experts on each node, as far as a token's experts go."""
    each = 16 * num_nodes // groups
    model = replace(V3, n_routed_experts=16 * num_nodes, n_group=groups, topk_group=kept,
                    num_experts_per_tok=min(8, each * kept))
    nodes_of = [{expert // 16 for expert in range(group * each, (group + 1) * each)} for group in range(groups)]
    most = max(len(set().union(*chosen)) for chosen in combinations(nodes_of, kept))
    assert node_reach(model, Layout(dp=num_nodes, ep=num_nodes), 1).most == min(most, model.num_experts_per_tok)


def test_without_groups_only_the_experts_of_a_token_limit_it():
    assert node_reach(V2_LITE, Layout(dp=64, ep=64), 8).most == 6


def test_what_the_user_reads():
    assert not list(describe_reach(V3, Layout(dp=8, ep=8), 8))
    (line,) = describe_reach(V3, Layout(dp=64, ep=64), 8)
    assert line.startswith("experts on 8 nodes of 8 ranks: a token goes to at most 4 of them")
    _, note = describe_reach(V3, Layout(dp=48, ep=48), 8)
    assert "--moe-router-num-groups 8 and 6 nodes" in note
