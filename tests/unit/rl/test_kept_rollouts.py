"""A rollout that is kept: training sends every token to the experts that the engine chose, and finds each sampled token
as likely as the engine did among the ids that it was drawn among; after routers have moved, too.
"""

from dataclasses import replace

import pytest
import torch
from small_engines import spread_weights
from small_models import V3_SMALL, whole_stage

from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.router import Router
from megatron_deepseek.rl.objective import GroupRelative
from megatron_deepseek.rl.rollout.engine import RolloutEngine
from megatron_deepseek.rl.rows import RowShape, pack_samples
from megatron_deepseek.rl.samples import KEPT_IDS, REPLAYED
from megatron_deepseek.rl_settings import PolicyLossSettings, RolloutSettings
from megatron_deepseek.settings import LossSettings
from megatron_deepseek.training.replay import layers_to_replay
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

CONFIG = replace(V3_SMALL, num_hidden_layers=4)  # three with experts
LENGTH, TEMPERATURE = 32, 1.2
ROLLOUT = RolloutSettings(group_size=3, max_tokens=7, top_p=0.7, keep_routing=True, keep_sampling_mask=True)
PROMPTS = [(5, 9, 2, 44, 17), (3, 8), (21, 7, 30)]


@pytest.fixture
def trainer(meshes) -> Trainer:
    build = BuildOptions(precision=Precision(torch.float64), loss=LossSettings(balance_type="none"))
    spec = TrainingSpec(CONFIG, (whole_stage(CONFIG),), "1F1B", LENGTH, 1, build)
    made = Trainer(spec, meshes, GroupRelative(PolicyLossSettings(temperature=TEMPERATURE)))
    spread_weights(made.stages[0])
    return made


@pytest.fixture
def rollout(trainer):
    engine = RolloutEngine(trainer, ROLLOUT, None, (), LENGTH)
    engine.refresh()
    groups = engine.generate(PROMPTS, [1, 2, 3], ROLLOUT, TEMPERATURE)
    samples = [sample for group in groups for sample in group]
    advantages_N = torch.arange(len(samples)).double() - 4
    return samples, pack_samples(samples, advantages_N, RowShape(LENGTH, 1, pad=0))


def experts_by_sample(trainer, packed, batch) -> dict[int, dict[str, torch.Tensor]]:
    """Of each sample the experts of its tokens but the last, in each layer [tokens, K], in order of their numbers."""
    scores = trainer.score(batch, experts=True)
    begins = {place.sample: (place.row, place.labels.stop) for place in packed.places}
    return {number: {layer: experts_BSK[row, :end] for layer, experts_BSK in scores.experts.items()}
            for number, (row, end) in begins.items()}


def flips(found: dict, samples) -> int:
    """In how many places, of tokens and layers, a token has other experts than the rollout's."""
    total = 0
    for number, layers in found.items():
        for layer in layers_to_replay(CONFIG):
            kept_TK = samples[number].experts[layer]
            own_TK = layers[layer][len(layers[layer]) - len(kept_TK):]
            total += int((own_TK.sort(-1).values != kept_TK.sort(-1).values).any(-1).sum())
    return total


def test_training_finds_the_rollout_as_likely_as_the_engine_did(trainer, rollout):
    samples, packed = rollout
    assert {KEPT_IDS, REPLAYED} <= packed.batch.per_token.keys()
    assert any(kept is not None for sample in samples for kept in sample.kept_ids)
    scores = trainer.score(packed.batch, distribution=trainer.objective.distribution(packed.batch))
    for number, found in packed.of_samples(scores.log_probabilities_BS).items():
        assert found.tolist() == pytest.approx(samples[number].log_probabilities, abs=1e-9)


def test_every_token_goes_where_the_rollout_went_after_routers_have_moved(trainer, rollout):
    samples, packed = rollout
    free = replace(packed.batch, per_token={name: each for name, each in packed.batch.per_token.items()
                                            if name != REPLAYED})
    assert flips(experts_by_sample(trainer, packed, free), samples) == 0  # in float64 both programs choose alike
    with torch.no_grad():
        for module in trainer.stages[0].modules():
            if isinstance(module, Router):
                noise = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1))
                module.weight.to_local().add_(0.3 * noise)
    assert flips(experts_by_sample(trainer, packed, free), samples) > 20
    assert flips(experts_by_sample(trainer, packed, packed.batch), samples) == 0
    result = trainer.train_step(packed.batch, learning_rate=1e-3, bias_rate=0.1)
    assert result.updated and result.grad_norm > 0
    assert not any(counts.any() for counts in result.expert_counts.values()), "all tokens of samples are replayed"
