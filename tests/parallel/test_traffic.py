"""Bytes that travel inside nodes and between them, counted by hand for each dispatcher with sliced experts, and the
results that come back.

4 ranks on 2 nodes: rank = 2 * ep + etp, so an etp group is a node, and a token with an expert of the other node crosses.
4 experts, 0 and 1 on the first node; 3 tokens a rank, 2 choices each.
"""

import pytest
import torch

from megatron_deepseek.model.build import make_dispatcher
from megatron_deepseek.parallel.expert import NOBODY
from megatron_deepseek.parallel.expert_tensor import ExpertTensorParallel
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.nodes import Traffic
from megatron_deepseek.parallel.turns import Turns
from megatron_deepseek.settings import CommunicationSettings

HIDDEN = 16
ROW = HIDDEN * 8  # bytes in float64
CHOICES = ([[0, 1], [2, 3], [0, 2]], [[0, NOBODY], [1, 0], [3, 0]],
           [[2, 3], [3, 0], [NOBODY, NOBODY]], [[1, 0], [0, 1], [2, 0]])

# Rows for the first node: 3 of rank 0 and 1 of rank 2 come to rank 0; 4 of rank 1 and 5 of rank 3 to rank 1. Each sends
# the 9 of the longer to the other, and as many results. Second node: 3 + 3 and 1 + 1, so 6 and 6.
WITHIN = [18 * ROW, 18 * ROW, 12 * ROW, 12 * ROW]
# A rank sends rows across, and results of the rows that came.
ACROSS = {
    "alltoall": [(3 + 1) * ROW, (1 + 5) * ROW, (1 + 3) * ROW, (5 + 1) * ROW],
    # every token with its 2 weights and 2 choices, and a partial sum for every token of the other
    "allgather": [3 * (ROW + 32) + 3 * ROW] * 4,
    # a token once, with its weights and choices
    "grouped": [2 * (ROW + 32) + 1 * ROW, 1 * (ROW + 32) + 3 * ROW, 1 * (ROW + 32) + 2 * ROW, 3 * (ROW + 32) + ROW],
}
# Copies of tokens that go to the other node; with grouped, tokens.
CROSSINGS = {"alltoall": [3, 1, 1, 5], "allgather": [3] * 4, "grouped": [2, 1, 1, 3]}


def dispatch(kind: str) -> tuple[Traffic, float]:
    """What was sent, and how far the result is off. Expert e multiplies by e + 1, half on each slice."""
    meshes = build_meshes(Layout(dp=4, ep=2, etp=2), torch.device("cpu"))
    dispatcher = make_dispatcher(4, meshes, CommunicationSettings("ring", kind, moe_ranks_per_node=2), Turns())
    slices = ExpertTensorParallel(meshes.experts, 2)
    first = 2 * meshes.rank("ep")

    def mlp(rows, counts):
        factors = torch.tensor([first + 1.0, first + 2.0], dtype=torch.float64)
        return rows * factors.repeat_interleave(torch.tensor(counts)).unsqueeze(1) / 2

    rank = 2 * meshes.rank("ep") + meshes.rank("etp")
    generator = torch.Generator().manual_seed(rank)
    x_TH = torch.randn(3, HIDDEN, dtype=torch.float64, generator=generator)
    weights_TK = torch.rand(3, 2, dtype=torch.float64, generator=generator)
    experts_TK = torch.tensor(CHOICES[rank])
    y_TH, sent = dispatcher(x_TH, experts_TK, weights_TK, lambda rows, counts: slices(rows, counts, mlp))
    expected = x_TH * (weights_TK * (experts_TK + 1)).sum(1, keepdim=True)  # NOBODY + 1 is 0
    return sent, (y_TH - expected).abs().max().item()


@pytest.mark.parametrize("kind", ACROSS)
def test_bytes_by_hand(ranks, kind):
    sent, errors = zip(*ranks.run(4, dispatch, kind))
    assert list(sent) == [*map(Traffic, WITHIN, ACROSS[kind], CROSSINGS[kind])]
    assert max(errors) < 1e-12
