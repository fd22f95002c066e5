"""The loss of samples by their advantages: a hand-worked batch, and verl's formulas; TRL's: tests/engines/test_trl.py.
"""

import pytest
import torch

from megatron_deepseek.rl.advantages import group_advantages
from megatron_deepseek.rl.losses import PaddedSamples, SampledTokens, grpo_loss, k3, token_losses
from megatron_deepseek.rl_settings import PolicyLossSettings

# Two groups of two samples: rewards 1, 0 and 1, 1, and of each sample the ratios and log p_reference / p of its tokens.
RATIOS = ([1.3, 0.9], [0.7, 1, 1.1], [1.05], [1.5, 0.5])
TO_REFERENCE = ([0.1, -0.2], [0, 0.3, -0.1], [0.2], [0, 0.1])
TRUNCATED = 6e-8  # of the digits that the numbers below have


def padded(rows, filler=0.0) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=torch.float64)


def toy(filler=0.0, kind="population-std") -> dict[str, torch.Tensor]:
    """The batch, with `filler` for log-probabilities of padding."""
    mask_NT = padded([[1] * len(row) for row in RATIOS])
    policy_NT = -1 - padded([range(len(row)) for row in RATIOS])
    advantages = group_advantages([1, 0, 1, 1], [0, 0, 1, 1], PolicyLossSettings(advantage=kind, advantage_epsilon=0.0))
    made = {"policy_NT": policy_NT, "old_NT": policy_NT - padded(RATIOS, 1.0).log(),
            "reference_NT": policy_NT + padded(TO_REFERENCE)}
    made = {name: each.where(mask_NT > 0, filler) for name, each in made.items()}
    return {**made, "mask_NT": mask_NT, "advantages_N": advantages.values_N}


def loss(given=None, **settings) -> float:
    return grpo_loss(**(given or toy()), settings=PolicyLossSettings(**settings)).item()


@pytest.mark.parametrize("kl, expected", [
    ("none", (-0.0208333, 0.1, 0.05)), ("k3", (-0.0202916, 0.1005259, 0.0502629)),
    ("unbiased", (-0.0202938, 0.1005191, 0.1005191 / 2))])
def test_aggregations_and_divergences(kl, expected):
    found = [loss(kl=kl, loss_aggregation=aggregation, loss_constant=4)
             for aggregation in ("sample-mean", "token-mean", "constant")]
    assert found == pytest.approx(expected, abs=TRUNCATED)


def test_dr_grpo_leaves_out_the_spread_too():
    assert loss(toy(kind="none"), loss_aggregation="constant", loss_constant=4) == pytest.approx(0.025)


def test_clipping_higher():
    """Of 1.3 with A = 1, 1.28 remains: the sum of 0.8 becomes 0.72, over 8 tokens."""
    assert loss(clip_high=0.28, loss_aggregation="token-mean") == pytest.approx(0.09)


@pytest.mark.parametrize("filler", [0.0, -1e30, float("nan"), float("-inf")])
def test_what_stands_in_padding_does_not_matter(filler):
    """The old policy's is -inf where the policy's is: the difference is not a number."""
    given = toy(filler)
    given["policy_NT"].requires_grad_()
    settings = PolicyLossSettings(kl="unbiased", ratio="cispo", off_policy_mask_delta=1.0,
                                  rollout_correction="sequence-truncate")
    found = grpo_loss(**given, rollout_NT=given["old_NT"], settings=settings)
    (gradient,) = torch.autograd.grad(found, given["policy_NT"])
    assert found.item() == pytest.approx(loss(kl="unbiased", ratio="cispo"))
    assert not gradient[given["mask_NT"] == 0].any() and gradient[given["mask_NT"] > 0].isfinite().all()


def test_without_old_ones_the_policy_is_the_old_one():
    """Every ratio is 1, the loss minus the mean advantage, but its gradient is not 0."""
    given = toy()
    del given["old_NT"]
    policy_NT = given["policy_NT"].requires_grad_()
    found = grpo_loss(**given)
    found.backward()
    assert found.item() == pytest.approx(0.0)
    expected = -given["advantages_N"][:, None] * given["mask_NT"] / given["mask_NT"].sum(1, keepdim=True) / 4
    assert torch.allclose(policy_NT.grad, expected)


def test_a_masked_sample_does_not_count():
    """Without the second sample the sample mean is -1.05 over 3."""
    given = toy()
    given["mask_NT"][1] = 0
    assert loss(given) == pytest.approx(-1.05 / 3)
    assert loss(given, loss_aggregation="token-mean") == pytest.approx(-2.1 / 5)


def test_a_batch_without_tokens_has_no_loss():
    given = toy()
    given["mask_NT"].zero_()
    assert loss(given) == loss(given, loss_aggregation="token-mean") == 0.0


# Ratios ---------------------------------------------------------------------------------------------------------------

def tokens(given=None, **more) -> SampledTokens:
    given = given or toy()
    advantages_NT = given["advantages_N"].unsqueeze(1).expand_as(given["policy_NT"])
    return SampledTokens(given["policy_NT"], given["old_NT"], advantages_NT, given["mask_NT"], PaddedSamples(),
                         reference=given["reference_NT"], **more)


def test_gspo_has_one_ratio_a_sample():
    found = token_losses(tokens(), PolicyLossSettings(ratio="sequence")).ratio
    assert found[:, 0].tolist() == pytest.approx([1.081665, 0.916566, 1.05, 0.866025], abs=5e-7)
    assert loss(ratio="sequence") == pytest.approx((-1.081665 + 0.916566) / 4, abs=5e-7)


def test_gspo_spreads_its_gradient_over_the_sample():
    given = toy()
    policy_NT = given["policy_NT"].requires_grad_()
    grpo_loss(**given, settings=PolicyLossSettings(ratio="sequence")).backward()
    assert policy_NT.grad[0, :2].tolist() == pytest.approx([-1.081665 / 8] * 2, abs=1e-7)


def test_cispo_keeps_the_gradient_of_what_it_clips():
    """The weights are 1.2 and 0.9 of the first sample, 0.8, 1 and 1.1 of the second."""
    given = toy()
    policy_NT = given["policy_NT"].requires_grad_()
    found = grpo_loss(**given, settings=PolicyLossSettings(ratio="cispo", loss_aggregation="token-mean"))
    found.backward()
    weights = [-1.2, -0.9], [0.8, 1, 1.1]
    assert (8 * policy_NT.grad[0, :2]).tolist() == pytest.approx(weights[0])
    assert (8 * policy_NT.grad[1]).tolist() == pytest.approx(weights[1])
    log_p = [-1, -2, -1, -2, -3]
    assert 8 * found.item() == pytest.approx(sum(w * x for w, x in zip(sum(weights, []), log_p)))


@pytest.mark.parametrize("rho, advantage, expected, slope", [
    (4.0, -1.0, 3.0, 0.0), (2.0, -1.0, 2.0, 2.0), (4.0, 1.0, -1.2, 0.0), (0.5, 1.0, -0.5, -0.5), (0.5, -1.0, 0.8, 0.0)])
def test_dual_clip(rho, advantage, expected, slope):
    """A bad token's ratio counts up to 3; above it there is no gradient. Without the third clip it counts whole."""
    policy_NT = torch.tensor([[rho]], dtype=torch.float64).log().requires_grad_()
    given = dict(policy_NT=policy_NT, old_NT=torch.zeros_like(policy_NT), mask_NT=torch.ones(1, 1),
                 advantages_N=torch.tensor([advantage]))
    found = grpo_loss(**given, settings=PolicyLossSettings(dual_clip=3.0))
    found.backward()
    assert found.item() == pytest.approx(expected) and policy_NT.grad.item() == pytest.approx(slope)
    if rho == 4 and advantage < 0:
        assert loss(given) == pytest.approx(4)


# Divergence -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kl, expected", [("unbiased", -0.3), ("k3", -0.349859)])
def test_gradient_of_the_divergence(kl, expected):
    """With rho 1 and log p_reference / p = 0.3 the true gradient is -0.3 times that of log p."""
    policy_NT = torch.full((1, 1), -1.0, dtype=torch.float64, requires_grad=True)
    grpo_loss(policy_NT, torch.zeros(1), torch.ones(1, 1), PolicyLossSettings(kl=kl, kl_beta=1.0),
              reference_NT=policy_NT.detach() + 0.3).backward()
    assert policy_NT.grad.item() == pytest.approx(expected, abs=5e-7)


def test_k3_is_accurate_near_zero():
    x = torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    assert k3(x).tolist() == pytest.approx([5e-13, 5e-13], rel=1e-5, abs=0)


@pytest.mark.parametrize("kl", ["k3", "unbiased"])
def test_a_needed_model_is_asked_for(kl):
    given = toy()
    del given["reference_NT"]
    with pytest.raises(ValueError, match=f"--kl {kl} needs the reference model's log-probabilities"):
        loss(given, kl=kl)
    with pytest.raises(ValueError, match="--rollout-correction token-mask needs the engine's"):
        loss(given, rollout_correction="token-mask")


# Distance from what drew the tokens -----------------------------------------------------------------------------------

def kept(made: SampledTokens, delta: float) -> list[float]:
    return token_losses(made, PolicyLossSettings(off_policy_mask_delta=delta)).kept[:, 0].tolist()


def test_bad_samples_that_are_too_far_off_are_left_out():
    """Means of log p_old / p are -0.0785, 0.0871, -0.0488, 0.1438; only the second sample's advantage is negative."""
    assert kept(tokens(), 0.05) == [1, 0, 1, 1] and kept(tokens(), 0.09) == [1, 1, 1, 1]
    assert loss(off_policy_mask_delta=0.05) == pytest.approx(-1.05 / 4)


def test_what_is_left_out_still_counts_and_is_held_to_the_reference():
    """The policy's term alone is dropped, and no denominator changes."""
    dropped = loss(off_policy_mask_delta=0.05, kl="k3") - loss(off_policy_mask_delta=0.05)
    assert dropped == pytest.approx(loss(kl="k3") - loss())


def test_the_engine_is_what_drew_the_tokens():
    """By its probabilities the second sample is 0.2 nearer."""
    given = toy()
    nearer = tokens(given, rollout=given["old_NT"] - 0.2)
    assert kept(nearer, 0.05) == [1, 1, 1, 1] and kept(nearer, -0.2) == [1, 0, 1, 1]


@pytest.mark.parametrize("correction, expected", [
    ("token-truncate", [[0.5, 1.5], [1.5, 1, 1]]), ("token-mask", [[0.5, 0], [0, 1, 1]]),
    ("sequence-truncate", [[1.5, 1.5], [1.5, 1.5, 1.5]]), ("sequence-mask", [[0, 0], [0, 0, 0]])])
def test_corrections_of_the_engines_probabilities(correction, expected):
    """The training model gives tokens 0.5, 4, 2, 1, 1, 1, 0.1, 3 times the engine's probability."""
    given, factors = toy(), padded([[0.5, 4], [2, 1, 1], [1], [0.1, 3]], 1.0)
    made = tokens(given, rollout=given["old_NT"] - factors.log())
    settings = PolicyLossSettings(rollout_correction=correction, rollout_correction_threshold=1.5)
    found = token_losses(made, settings)
    weights = found.correction.expand_as(factors)
    assert weights[0, :2].tolist() == pytest.approx(expected[0]) and weights[1].tolist() == pytest.approx(expected[1])
    last = {"token-truncate": [0.1, 1.5], "token-mask": [0.1, 0]}.get(correction, [0.3, 0.3])
    assert weights[3, :2].tolist() == pytest.approx(last)
    plain = token_losses(made, PolicyLossSettings()).policy
    assert torch.allclose(found.policy, plain * found.correction)


# verl -----------------------------------------------------------------------------------------------------------------

def verl_loss(given, settings: PolicyLossSettings) -> torch.Tensor:
    """Verl's compute_policy_loss_vanilla, low_var_kl and agg_loss (verl/trainer/ppo/core_algos.py), in its order."""
    mask, advantages = given["mask_NT"], given["advantages_N"][:, None]
    negative_approx_kl = torch.clamp(given["policy_NT"] - given["old_NT"], min=-20.0, max=20.0)
    ratio = torch.exp(negative_approx_kl)
    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
    clip_pg_losses1 = torch.maximum(pg_losses1, pg_losses2)
    clip_pg_losses2 = torch.min(-advantages * settings.dual_clip, clip_pg_losses1)
    losses = torch.where(advantages < 0, clip_pg_losses2, clip_pg_losses1)
    if settings.kl == "k3":
        kl = torch.clamp(given["reference_NT"] - given["policy_NT"], min=-20, max=20)
        losses = losses + settings.kl_beta * torch.clamp(torch.exp(kl) - kl - 1, min=-10, max=10)
    if settings.loss_aggregation == "token-mean":
        return (losses * mask).sum() / mask.sum()
    per_sample = (losses * mask).sum(-1)
    return (per_sample / mask.sum(-1) if settings.loss_aggregation == "sample-mean"
            else per_sample / settings.loss_constant).mean()


def random_batch(seed: int) -> dict[str, torch.Tensor]:
    """Six samples of 1 to 9 tokens: ratios from 0.3 to 5, advantages of both signs and 0."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(6, 9, dtype=torch.float64, generator=generator)

    mask_NT = (torch.arange(9) < torch.randint(1, 10, (6, 1), generator=generator)).double()
    policy_NT = -noise(1.0).abs()
    advantages_N = torch.randn(6, dtype=torch.float64, generator=generator) * (torch.arange(6) != 2)
    return {"policy_NT": policy_NT, "old_NT": policy_NT + noise(0.7), "reference_NT": policy_NT + noise(0.3),
            "mask_NT": mask_NT, "advantages_N": advantages_N}


@pytest.mark.parametrize("aggregation", ["sample-mean", "token-mean", "constant"])
@pytest.mark.parametrize("kl", ["none", "k3"])
def test_losses_and_gradients_are_those_of_verl(aggregation, kl):
    settings = PolicyLossSettings(loss_aggregation=aggregation, loss_constant=11, kl=kl, dual_clip=3.0, clip_high=0.28)
    for seed in range(3):
        given = random_batch(seed)
        policy_NT = given["policy_NT"].requires_grad_()
        found, expected = grpo_loss(**given, settings=settings), verl_loss(given, settings)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        gradients = [torch.autograd.grad(each, policy_NT)[0] for each in (found, expected)]
        assert torch.allclose(*gradients, rtol=1e-12, atol=1e-15) and gradients[0].abs().max() > 0
