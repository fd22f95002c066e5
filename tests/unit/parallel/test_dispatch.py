"""Copies of some choices by gradcheck and against indexing; bytes and nodes against counts worked by hand."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from small_models import V3_SMALL
from torch.autograd import gradcheck

from megatron_deepseek.model.router import balanced_choice
from megatron_deepseek.ops.copies import Copies, copy_rows, sort_choices, sum_copies
from megatron_deepseek.parallel.expert import DROPPED, AllToAllDispatcher
from megatron_deepseek.parallel.expert_gather import AllGatherDispatcher
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.parallel.nodes import CommunicationCounter, Traffic, places_per_node

ALONE = SimpleNamespace(size=lambda: 1)  # for a mesh of one rank
BINS = torch.tensor([[2, -1, 0], [5, 5, 5], [1, 2, 0], [0, 7, 1]])  # of 3: row 1 has no copy
ROWS_IN_ORDER = [0, 2, 3, 2, 3, 0, 2]  # bin 0, then 1, then 2; within a bin by row


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
                       ).requires_grad_()


def sorted_copies(bins: torch.Tensor, num_bins: int) -> Copies:
    choices = sort_choices(bins, num_bins)
    return choices.cut(choices.counts.tolist())


def test_copies_are_sorted_by_bin_and_the_rest_has_none():
    copies = sorted_copies(BINS, 3)
    assert copies.row_R.tolist() == ROWS_IN_ORDER and copies.counts == [3, 2, 2]
    assert [BINS[row, choice] for row, choice in zip(copies.row_R, copies.choice_R)] == [0, 0, 0, 1, 1, 2, 2]
    assert copies.place_QK.tolist() == [[5, 7, 0], [7, 7, 7], [3, 6, 1], [2, 7, 4]]


def test_sum_of_copies_and_gradients():
    copies, x, weights = sorted_copies(BINS, 3), doubles(4, 2), doubles(4, 3)
    factor = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64)  # what an expert does
    rows = copy_rows(x, copies) * factor.repeat_interleave(torch.tensor(copies.counts)).unsqueeze(1)
    gains = torch.where(BINS.clamp(0, 2) == BINS, factor[BINS.clamp(0, 2)], 0.0)
    torch.testing.assert_close(sum_copies(rows, weights, copies), (weights * gains).sum(1, keepdim=True) * x)
    assert gradcheck(lambda x: copy_rows(x, copies), (x,))
    assert gradcheck(lambda y, w: sum_copies(y, w, copies), (doubles(7, 2), weights))


def test_no_copies_at_all():
    copies, x, weights = sorted_copies(torch.full((2, 3), 9), 4), doubles(2, 5), doubles(2, 3)
    y = sum_copies(copy_rows(x, copies), weights, copies)
    assert copies.counts == [0] * 4 and not y.any()
    y.sum().backward()
    assert not x.grad.any() and not weights.grad.any()


def test_no_rows_at_all():
    """A rank that was sent nothing still back-propagates: others wait for its collectives."""
    copies, x = sorted_copies(torch.empty(0, 1, dtype=torch.int64), 4), torch.empty(0, 5, requires_grad=True)
    weights = torch.empty(0, 1, requires_grad=True)
    sum_copies(copy_rows(x, copies), weights, copies).sum().backward()
    assert copies.counts == [0] * 4 and x.grad.shape == (0, 5) and weights.grad.shape == (0, 1)


@pytest.mark.parametrize("dispatcher", [AllToAllDispatcher(ALONE, 4, CommunicationCounter(1), MicroBatchOverlap()),
                                        AllGatherDispatcher(ALONE, 4, CommunicationCounter(1))],
                         ids=("alltoall", "allgather"))
def test_dispatch_with_nobody_to_send_to(dispatcher):
    """Expert e multiplies by e + 1, so that DROPPED, which is -1, adds nothing."""
    def experts(rows, counts_se, keys):
        assert keys is None
        (counts,) = counts_se
        return rows * torch.arange(1.0, 5.0, dtype=rows.dtype).repeat_interleave(torch.tensor(counts)).unsqueeze(1)

    chosen, x, weights = torch.tensor([[2, 0], [1, DROPPED], [3, 2]]), doubles(3, 5), doubles(3, 2)
    y, cross_node_sends = dispatcher(x, dispatcher.route(chosen), weights, experts)
    torch.testing.assert_close(y, (weights * (chosen + 1)).sum(1, keepdim=True) * x)
    assert cross_node_sends == 0
    assert gradcheck(lambda x, weights: dispatcher(x, dispatcher.route(chosen), weights, experts)[0], (x, weights))


def test_a_meter_adds_up_bytes_and_leaves_out_what_a_rank_keeps(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 5, 6, 7])
    assert CommunicationCounter(2).divide(None, [1, 20, 300, 4000]) == Traffic(1, 4300)
    assert CommunicationCounter(4).divide(None, [1, 20, 300, 4000]) == Traffic(4301, 0)
    counter = CommunicationCounter(2)
    counter.rows(None, [2, 7, 0, 3], torch.empty(5, 4, dtype=torch.bfloat16))
    counter.rows(None, [1, 7, 1, 0], torch.empty(0, 2, dtype=torch.int64))
    assert counter.take() == Traffic(2 * 8 + 16, 3 * 8 + 16)
    assert counter.take() == Traffic()


@pytest.mark.parametrize("layout, ranks_per_node, places", [
    (Layout(dp=64, ep=64), 8, 8), (Layout(dp=8, ep=4), 8, 4), (Layout(dp=4, tp=2, ep=4, etp=2), 4, 2)])
def test_places_on_a_node(layout, ranks_per_node, places):
    assert places_per_node(layout, ranks_per_node) == places


def test_uneven_nodes_are_refused():
    with pytest.raises(ValueError, match="nodes of 3 ranks .* 4 ranks"):
        places_per_node(Layout(dp=4, ep=4), 3)


def test_forced_balance_is_exact_and_within_the_groups_that_a_token_may_reach():
    config = V3_SMALL
    experts_TK = balanced_choice(torch.arange(3 * config.n_routed_experts), config)
    assert experts_TK.flatten().bincount().tolist() == [3 * config.num_experts_per_tok] * config.n_routed_experts
    for experts in experts_TK:
        assert len(set(experts.tolist())) == config.num_experts_per_tok
        assert len(set((experts // (config.n_routed_experts // config.n_group)).tolist())) <= config.topk_group
