"""Expert capacity and who is routed at all: cases worked by hand, then loops over tokens on random choices."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import V3_SMALL, enliven, forward, random_batch, training_batch, whole_model, whole_stage

from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.capacity import Capacity
from megatron_deepseek.model.shifts import routed_tokens
from megatron_deepseek.parallel.expert import DROPPED
from megatron_deepseek.settings import LossSettings
from megatron_deepseek.training.trainer import TrainingSpec, Trainer

FOUR = torch.arange(4)


def keep(experts, weights, factor: float, policy: str, num_experts: int = 2, positions=FOUR) -> list:
    """Of one sequence of four tokens."""
    experts_BSK, weights_BSK = torch.tensor([experts]), torch.tensor([weights], dtype=torch.float64)
    return Capacity(factor, policy, num_experts).keep(experts_BSK, weights_BSK, positions, None)[0].tolist()


def test_the_largest_weights_stay():
    """4 tokens, 1 choice of 2 experts: an even share is 2. Expert 0 has three takers, of which 0.1 is the least."""
    experts, weights = [[0], [0], [0], [1]], [[0.1], [0.9], [0.5], [0.3]]
    assert keep(experts, weights, 1.0, "probs") == [[DROPPED], [0], [0], [1]]
    assert keep(experts, weights, 1.5, "probs") == experts
    assert keep(experts, weights, 0.5, "probs") == [[DROPPED], [0], [DROPPED], [1]]


def test_the_first_of_the_sequence_stay():
    experts, weights = [[0], [0], [0], [1]], [[0.1], [0.9], [0.5], [0.3]]
    assert keep(experts, weights, 1.0, "position") == [[0], [0], [DROPPED], [1]]
    last_first = torch.tensor([3, 2, 1, 0])  # as a rank may hold them
    assert keep(experts, weights, 1.0, "position", positions=last_first) == [[DROPPED], [0], [0], [1]]


def test_of_equal_weights_the_first_stay():
    assert keep([[0], [0], [0], [0]], [[0.5]] * 4, 1.0, "probs") == [[0], [0], [DROPPED], [DROPPED]]


def test_a_token_keeps_its_other_experts():
    """2 choices of 4 experts: 2 copies each. Token 2 loses expert 0 and keeps expert 3."""
    experts = [[0, 1], [2, 0], [3, 0], [1, 2]]
    weights = [[0.5, 0.5], [0.4, 0.6], [0.9, 0.1], [0.5, 0.5]]
    assert keep(experts, weights, 1.0, "probs", 4) == [[0, 1], [2, 0], [3, DROPPED], [1, 2]]


def test_who_is_not_routed_takes_no_room_and_gives_none():
    """Two of four tokens are routed: an even share is one, not two."""
    experts, weights = [[DROPPED], [0], [DROPPED], [0]], [[9.0], [0.5], [9.0], [0.7]]
    assert keep(experts, weights, 1.0, "probs") == [[DROPPED], [DROPPED], [DROPPED], [0]]


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_against_a_loop(policy, factor):
    """3 sequences of 16 tokens, 3 of 8 experts, some tokens not routed."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(48)]).view(3, 16, 3)
    experts[1, 5:9] = DROPPED
    weights = torch.rand(3, 16, 3, generator=generator, dtype=torch.float64)
    kept = Capacity(factor, policy, 8).keep(experts, weights, torch.arange(16), None)
    dropped = 0
    for row, (chosen, weight) in enumerate(zip(experts.tolist(), weights.tolist())):
        routed = sum(token[0] != DROPPED for token in chosen)
        limit = math.ceil(factor * routed * 3 / 8)
        for expert in range(8):
            takers = [(s, k) for s in range(16) for k in range(3) if chosen[s][k] == expert]
            if policy == "probs":
                takers.sort(key=lambda place: -torch.tensor(weight[place[0]][place[1]]).half().item())
            for number, (s, k) in enumerate(takers):
                assert kept[row, s, k] == (expert if number < limit else DROPPED)
                dropped += number >= limit
    assert dropped == (kept != experts).sum()
    assert (dropped > 0) == (factor <= 1.0)


def test_a_model_drops_what_its_sequences_drop(meshes):
    """Batch of 3 sequences and each alone: the same outputs. Nothing dropped at a factor that reaches everything."""
    def outcome(model, *batch):
        return forward(model, *batch)

    batch = random_batch(V3_SMALL, 3, 11)
    limited = LossSettings(moe_expert_capacity_factor=0.5, moe_token_drop_policy="position")
    model = whole_model(V3_SMALL, meshes, 11, loss=limited)
    together = outcome(model, *batch)
    apart = [outcome(model, *(x[row:row + 1] for x in batch)) for row in range(3)]
    assert together.statistics.dropped == sum(each.statistics.dropped for each in apart) > 0
    for row, each in enumerate(apart):
        torch.testing.assert_close(each.logits[0], together.logits[0][row:row + 1], rtol=1e-12, atol=1e-14)
    free = outcome(whole_model(V3_SMALL, meshes, 11), *batch)
    roomy = outcome(whole_model(V3_SMALL, meshes, 11, loss=replace(limited, moe_expert_capacity_factor=8.0)), *batch)
    assert free.statistics.dropped == roomy.statistics.dropped == 0
    assert torch.equal(free.logits[0], roomy.logits[0]) and not torch.equal(free.logits[0], together.logits[0])


def test_padding_takes_no_room(meshes):
    """A padded row drops and trains as the row without its padding does."""
    def step(length: int, *batch, **more):
        spec = TrainingSpec(V3_SMALL, (whole_stage(V3_SMALL),), "1F1B", length, micro_batch_size=2,
                    build=BuildOptions(precision=Precision(torch.float64),
                                       loss=LossSettings(moe_expert_capacity_factor=0.7)))
        made = Trainer(spec, meshes)
        enliven(made.stages[0])
        return made.train_step(training_batch(*batch, **more), learning_rate=0.0)

    tokens, labels, mask = random_batch(V3_SMALL, 2, 11)
    real = (torch.arange(11) < 6).repeat(2, 1)
    padded = step(11, tokens, labels, mask & real, real_BS=real)
    short = step(6, *(part[:, :6] for part in (tokens, labels, mask)))
    assert padded.dropped == short.dropped > 0
    assert padded.losses.lm_loss == pytest.approx(short.losses.lm_loss, rel=1e-12)
    assert padded.grad_norm == pytest.approx(short.grad_norm, rel=1e-10)


def test_the_router_counts_what_was_chosen(meshes):
    """Not what was kept: cut at the capacity, counts of crowded experts would look balanced to the bias."""
    counts = []
    for factor in (None, 0.5):
        model = whole_model(replace(V3_SMALL, num_hidden_layers=2), meshes, 11,
                            loss=LossSettings(moe_expert_capacity_factor=factor))
        counts.append(forward(model, *random_batch(V3_SMALL, 3, 11)).statistics.expert_counts["model.layers.1.mlp"])
    assert torch.equal(*counts)


def test_routed_tokens_by_hand():
    """A full row of 5 in two documents, and a row of 3 tokens and padding; MTP depth 2.

    Depth 1 at position i takes token i + 1 as input, depth 2 token i + 2.
    """
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert routed_tokens(real, 2).long().tolist() == [
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]],
        [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]]
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    assert routed_tokens(real, 2, documents).long().tolist() == [
        [[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 0, 0, 0, 0]],
        [[1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]]
    assert routed_tokens(real[:, :1], 3).long().tolist() == [[[1], [0], [0], [0]]] * 2
