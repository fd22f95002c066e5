"""Bytes that travel inside nodes and between them, forwards and backwards, counted by hand for each dispatcher with
sliced experts, and the results that come back.

4 ranks on 2 nodes: rank = 2 * ep + etp, so an etp group is a node, and a token with an expert of the other node
crosses. 4 experts, 0 and 1 on the first node; 3 tokens a rank, 2 choices each.
"""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from cases import Case
from job import batch, make_batch, spec_of

from megatron_deepseek.model.build import make_dispatcher
from megatron_deepseek.ops.fp8 import block_scaled
from megatron_deepseek.parallel.exchange import Transfer
from megatron_deepseek.parallel.expert import DROPPED, unchanged
from megatron_deepseek.parallel.expert_tensor import ExpertTensorParallel
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.parallel.nodes import CommunicationCounter, Traffic
from megatron_deepseek.training.trainer import Trainer

HIDDEN = 16
ROW = HIDDEN * 8  # bytes in float64
FP8_ROW = HIDDEN + 4  # codes, and the scale of one tile
WEIGHTS = CHOICES_OF_TOKEN = 2 * 8
CHOICES = ([[0, 1], [2, 3], [0, 2]], [[0, DROPPED], [1, 0], [3, 0]],
           [[2, 3], [3, 0], [DROPPED, DROPPED]], [[1, 0], [0, 1], [2, 0]])

# Rows for the first node: 3 of rank 0 and 1 of rank 2 come to rank 0; 4 of rank 1 and 5 of rank 3 to rank 1. Each sends
# the 9 of the longer to the other, and as many results. Second node: 3 + 3 and 1 + 1, so 6 and 6. In the backward
# gradients of results are gathered, and those of rows scattered: as many. FP8 rows are gathered as what they stand for.
WITHIN = [18 * ROW, 18 * ROW, 12 * ROW, 12 * ROW]

# What each rank sends to the other node and gets from it: copies of tokens, every token, or a token once.
SENT = {"alltoall": [3, 1, 1, 5], "allgather": [3] * 4, "grouped": [2, 1, 1, 3]}
RECEIVED = {"alltoall": [1, 5, 3, 1], "allgather": [3] * 4, "grouped": [1, 3, 2, 1]}


def bytes_across(kind: str, row: int) -> tuple[list[int], list[int]]:
    """Of each rank, forwards and backwards, where a token takes `row` bytes. With `alltoall` gradients of results
    travel to the experts as tokens do; whole tokens are weighed where they arrive, so their weights travel with them,
    the weights' gradients come back, and gradients of partial sums travel as they are.
    """
    token, gradient_of_result, gradient_of_token = {
        "alltoall": (row, row, ROW)}.get(kind, (row + WEIGHTS + CHOICES_OF_TOKEN, ROW, ROW + WEIGHTS))
    pairs = [*zip(SENT[kind], RECEIVED[kind])]
    return ([sent * token + received * ROW for sent, received in pairs],
            [sent * gradient_of_result + received * gradient_of_token for sent, received in pairs])


def dispatch(kind: str, fp8: bool) -> tuple[Traffic, Traffic, int, float]:
    """What was sent forwards and backwards, how often a token crossed, and how far the result is off. Expert e
    multiplies by e + 1, half on each slice.
    """
    meshes = build_meshes(Layout(dp=4, ep=2, etp=2), torch.device("cpu"))
    counter = CommunicationCounter(ranks_per_node=2)
    to_experts = block_scaled.quantize if fp8 else unchanged
    slices = ExpertTensorParallel(meshes.experts, counter)
    dispatcher = make_dispatcher(4, meshes, kind, MicroBatchOverlap(), slices, to_experts)
    first = 2 * meshes.rank("ep")

    def mlp(rows, counts, keys):
        factors = torch.tensor([first + 1.0, first + 2.0], dtype=torch.float64)
        return rows * factors.repeat_interleave(torch.tensor(counts)).unsqueeze(1) / 2

    rank = 2 * meshes.rank("ep") + meshes.rank("etp")
    generator = torch.Generator().manual_seed(rank)
    x_TH = torch.randn(3, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    weights_TK = torch.rand(3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    experts_TK = torch.tensor(CHOICES[rank])
    given_TH = block_scaled.share(x_TH) if fp8 else x_TH
    y_TH, cross_node_sends = dispatcher(given_TH, dispatcher.route(experts_TK), weights_TK,
                                        lambda rows, counts, keys: slices(rows, counts, mlp, keys))
    forward = counter.take()
    y_TH.sum().backward()
    expected = (given_TH * 1.0) * (weights_TK * (experts_TK + 1)).sum(1, keepdim=True)  # DROPPED + 1 is 0
    return forward, counter.take(), cross_node_sends, (y_TH - expected).abs().max().item()


@pytest.mark.parametrize("fp8", (False, True), ids=("float64", "fp8"))
@pytest.mark.parametrize("kind", SENT)
def test_bytes_by_hand(ranks, kind, fp8):
    forward, backward, cross_node_sends, errors = zip(*ranks.run(4, dispatch, kind, fp8))
    across = bytes_across(kind, FP8_ROW if fp8 else ROW)
    assert list(forward) == [*map(Traffic, WITHIN, across[0])]
    assert list(backward) == [*map(Traffic, WITHIN, across[1])]
    assert list(cross_node_sends) == SENT[kind]
    assert max(errors) < 1e-12


def traffic_of_step(case: Case) -> tuple[Traffic, Traffic, float]:
    """Of a step, of the next one after an evaluation, and its cross_node_sends for each token."""
    trainer = Trainer(spec_of(case), build_meshes(case.layout, torch.device("cpu")))
    own = make_batch(*batch(case.model, case.microbatches, 0))
    first = trainer.train_step(own, learning_rate=0.0)
    trainer.evaluate(own)
    second = trainer.train_step(own, learning_rate=0.0)
    return first.traffic, second.traffic, second.cross_node_sends


def test_recomputed_layers_send_their_tokens_again(ranks):
    """A forward's bytes come twice; an evaluation's are no step's; a token is counted once where it crosses."""
    case = Case(dp=2, ep=2, node=1, microbatches=2, mtp=1)
    (once, after_evaluation, cross_node_sends), _ = ranks.run(2, traffic_of_step, case)
    (again, _, as_often), _ = ranks.run(2, traffic_of_step, replace(case, recompute="full"))
    assert once == after_evaluation and once.within_node == 0 < once.across_nodes
    assert again.across_nodes == once.across_nodes * 3 / 2
    rows = once.across_nodes / (4 * ROW)  # there and back, forwards and backwards
    # Of each row one layer routes 8 tokens, the MTP module 7.
    assert cross_node_sends == as_often == rows / (2 * 2 * (8 + 7))


def bytes_of_ring(case: Case) -> int:
    """What a context rank sends the next one in a step."""
    sent, begin = [], Transfer.__init__

    def counted(self, block, group):
        sent.append(block.numel() * block.element_size())
        begin(self, block, group)

    with patch.object(Transfer, "__init__", counted):
        trainer = Trainer(spec_of(case), build_meshes(case.layout, torch.device("cpu")))
        trainer.train_step(make_batch(*batch(case.model, 1, 0)), learning_rate=0.0)
    return sum(sent)


@pytest.mark.parametrize("attention, tp, numbers", [
    ("latent", 1, 8 + 2), ("latent", 2, (8 + 2) / 2), ("grouped", 1, 2 * 2 * 4), ("grouped", 2, 2 * 4),
    ("one_key_head", 2, 2 * 4)])
def test_what_a_ring_carries(ranks, attention, tp, numbers):
    """By hand, of a token: a latent and a turned key, or keys and values of this rank's heads. 4 of 8 tokens are on
    each of 2 ranks, in 2 layers; a block goes to the other rank once, and its gradient back. Latents are the
    same on all TP ranks, each of which sends a part of them.
    """
    case = Case(cp=2, cp_type="ring", tp=tp, router="dense", attention=attention)
    assert ranks.run(2 * tp, bytes_of_ring, case) == [2 * (1 + 1) * 4 * numbers * 8] * (2 * tp)
