"""The objective over packed rows against `grpo_loss` of padded samples, whose log-probabilities a plain model gives.

The plain model sees one sample at a time: no packing, no padding, and torch's own softmax.
"""

from dataclasses import replace

import pytest
import torch
from reference_model import ReferenceModel
from rollout_samples import distances, random_samples
from small_models import V3_SMALL, enliven, gradients_of, relative_error, weights_of, whole_stage

from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.rl.advantages import group_advantages
from megatron_deepseek.rl.losses import grpo_loss
from megatron_deepseek.rl.objective import GroupRelative
from megatron_deepseek.rl.rows import PackedSamples, RowShape, pack_samples
from megatron_deepseek.rl.samples import OLD, REFERENCE, ROLLOUT
from megatron_deepseek.rl_settings import PolicyLossSettings
from megatron_deepseek.settings import LossSettings, OptimizerSettings
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

LENGTH, SAMPLES = 16, 8
CONFIG = replace(V3_SMALL, num_nextn_predict_layers=1)
EXACT = 1e-9  # float64 sums in another order


def trainer(meshes, settings: PolicyLossSettings, **options) -> Trainer:
    build = BuildOptions(precision=Precision(torch.float64), loss=LossSettings(balance_type="none"))
    made = Trainer(TrainingSpec(CONFIG, (whole_stage(CONFIG),), "1F1B", LENGTH, 1, build,
                                OptimizerSettings(clip_grad=0.0)), meshes, GroupRelative(settings, **options))
    enliven(made.stages[0])
    return made


def reference_of(made: Trainer) -> ReferenceModel:
    table_2SD = rope_table(CONFIG, LENGTH, torch.device("cpu"), torch.float64)
    return ReferenceModel(CONFIG, weights_of(made.stages[0]), table_2SD, CONFIG.qk_head_dim**-0.5)


def drawn_from(reference: ReferenceModel, sample, temperature: float) -> torch.Tensor:
    """Return the log-softmax that each token of the completion was drawn from, [T, V]."""
    ids = torch.tensor([*sample.prompt, *sample.tokens])
    logits = reference.logits(ids[None], LENGTH)[0][0, len(sample.prompt) - 1:len(ids) - 1] / temperature
    for token, kept in enumerate(sample.kept_ids or ()):
        if len(kept):
            others = torch.ones(logits.shape[-1], dtype=torch.bool)
            others[kept.long()] = False
            logits = logits.masked_fill(others & (torch.arange(len(logits)) == token)[:, None], -torch.inf)
    return logits.log_softmax(-1)


def padded(rows) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=torch.float64) for row in rows], True)


def packed(samples, rewards, settings: PolicyLossSettings, of_tokens) -> PackedSamples:
    advantages = group_advantages(rewards, [sample.group for sample in samples], settings).values_N
    return pack_samples(samples, advantages, RowShape(LENGTH, 1, 0), of_tokens, settings.overlong == "mask")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("settings", [
    PolicyLossSettings(),
    PolicyLossSettings(loss_aggregation="token-mean", kl="k3", dual_clip=1.3, overlong="mask", temperature=0.8),
    PolicyLossSettings(ratio="sequence", loss_aggregation="constant", loss_constant=7, kl="unbiased",
                       off_policy_mask_delta=0.05, rollout_correction="token-truncate", temperature=1.3)],
    ids=["grpo", "dapo", "mixed"])
def test_packed_rows_against_padded_samples(meshes, settings, kept):
    samples, rewards = random_samples(SAMPLES, 4, LENGTH, CONFIG.vocab_size, kept)
    rewards[:4] = [1.0, 0.0, 0.0, 2.0]
    made = trainer(meshes, settings)
    reference = reference_of(made)
    policy = [drawn_from(reference, sample, settings.temperature).gather(
        -1, torch.tensor(sample.tokens)[:, None])[:, 0] for sample in samples]
    others = {name: [each.detach() + torch.tensor(noise) for each, noise in zip(policy, distances(samples, seed, 0.3))]
              for seed, name in enumerate((OLD, REFERENCE, ROLLOUT))}
    rows = packed(samples, rewards, settings, others)
    found = made.train_step(rows.batch, learning_rate=0.0)

    counts = [sample.finished or settings.overlong != "mask" for sample in samples]
    mask_NT = padded([torch.full((len(each),), float(count)) for each, count in zip(policy, counts)])
    advantages = group_advantages(rewards, [sample.group for sample in samples], settings).values_N
    old_NT, reference_NT, rollout_NT = (padded(others[name]) for name in (OLD, REFERENCE, ROLLOUT))
    loss = grpo_loss(padded(policy), advantages, mask_NT, settings, old_NT=old_NT, reference_NT=reference_NT,
                     rollout_NT=rollout_NT)
    loss.backward()
    assert found.losses.trained == ("grpo_loss", pytest.approx(loss.item(), rel=EXACT))
    assert found.losses.num_labels == mask_NT.sum() and found.losses.counts["samples"] == sum(counts)
    expected = reference.gradients()
    for name, gradient in gradients_of(made.stages[0]).items():
        if expected[name].any():  # none of MTP modules
            assert relative_error(gradient, expected[name]) < EXACT, name


def test_scores_are_of_the_same_distribution(meshes):
    settings = PolicyLossSettings(temperature=0.6)
    samples, rewards = random_samples(SAMPLES, 4, LENGTH, CONFIG.vocab_size, kept=True)
    made = trainer(meshes, settings)
    rows, reference = packed(samples, rewards, settings, {}), reference_of(made)
    distribution = made.objective.distribution(rows.batch)
    scores = rows.of_samples(made.score(rows.batch, distribution=distribution).log_probabilities_BS)
    assert len(scores) == SAMPLES
    for number, found in scores.items():
        expected = drawn_from(reference, samples[number], 0.6)[range(len(found)), samples[number].tokens]
        torch.testing.assert_close(found, expected.detach(), rtol=EXACT, atol=EXACT)


# What is reported -----------------------------------------------------------------------------------------------------

def reports(meshes, settings, of_tokens=None, **options) -> dict[str, float]:
    """Of a step whose old and engine's log-probabilities are the policy's less `of_tokens`."""
    samples, _ = random_samples(SAMPLES, 2, LENGTH, CONFIG.vocab_size)
    made = trainer(meshes, settings, **options)
    rows = packed(samples, [1.0, 0.0] * 4, settings, of_tokens)
    scores = made.score(rows.batch, distribution=made.objective.distribution(rows.batch)).log_probabilities_BS
    others = {name: scores - rows.batch.per_token[name] for name in (of_tokens or {})}
    batch = replace(rows.batch, per_token={**rows.batch.per_token, ROLLOUT: scores, **others})
    return dict(made.train_step(batch, learning_rate=0.0).losses.objective)


def test_shares_that_are_clipped_are_of_tokens(meshes):
    """The first sample is good and its first token's ratio 1.3; the second one is bad and all its ratios 0.5, as are
    those of the third one, which is good: nothing clips them.
    """
    samples, _ = random_samples(SAMPLES, 2, LENGTH, CONFIG.vocab_size)
    lengths = [len(sample.tokens) for sample in samples]
    log_ratios = [torch.zeros(length) for length in lengths]
    log_ratios[0][0], log_ratios[1][:] = torch.tensor(1.3).log(), torch.tensor(0.5).log()
    log_ratios[2][:] = torch.tensor(0.5).log()
    found = reports(meshes, PolicyLossSettings(off_policy_mask_delta=0.5), {OLD: log_ratios, ROLLOUT: log_ratios})
    assert found["clip_high"] == pytest.approx(1 / sum(lengths))
    assert found["clip_low"] == pytest.approx(lengths[1] / sum(lengths))
    assert found["kl_to_old"] == pytest.approx(
        ((lengths[1] + lengths[2]) * (0.5 - 1 + 0.693147) + 1.3 - 1 - 0.262364) / sum(lengths), abs=1e-6)
    assert found["completion_length"] == sum(lengths) / SAMPLES
    assert found["off_policy_masked"] == 1 / SAMPLES and found["rollout_difference"] == 0


def test_the_mismatch_is_between_the_engine_and_the_old_policy(meshes):
    """The engine gave every token 0.8 times the probability that training gives it."""
    samples, _ = random_samples(SAMPLES, 2, LENGTH, CONFIG.vocab_size)
    nearer = {ROLLOUT: [[0.223144] * len(sample.tokens) for sample in samples]}
    found = reports(meshes, PolicyLossSettings(rollout_correction="token-truncate"), nearer)
    assert found["rollout_difference"] == pytest.approx(0.223144, abs=1e-6)
    assert found["rollout_kl"] == pytest.approx(1.25 - 1 - 0.223144, abs=1e-6)
    assert found["rollout_correction"] == pytest.approx(1.25, abs=1e-6)


def test_what_is_not_asked_for_is_not_reported(meshes):
    assert [*reports(meshes, PolicyLossSettings())] == [
        "grpo_loss", "clip_low", "clip_high", "kl_to_old", "rollout_kl", "rollout_difference", "completion_length"]


def test_the_entropy_is_that_of_the_temperature(meshes):
    cold, warm = (reports(meshes, PolicyLossSettings(temperature=each), entropy=True)["entropy"] for each in (0.5, 2.0))
    assert 0 < cold < warm < torch.tensor(CONFIG.vocab_size).log()


def test_mtp_modules_are_left_as_they_are(meshes):
    settings = PolicyLossSettings()
    samples, rewards = random_samples(SAMPLES, 4, LENGTH, CONFIG.vocab_size)
    made = trainer(meshes, settings)
    made.train_step(packed(samples, rewards, settings, {}).batch, learning_rate=0.1)
    unused = {name for name, each in made.stages[0].named_parameters() if each.grad is None}
    assert unused and all(name.startswith(f"model.layers.{CONFIG.num_hidden_layers}.") for name in unused)
