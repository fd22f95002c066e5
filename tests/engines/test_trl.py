"""The loss of samples beside TRL's own code, on the same log-probabilities (make test-engines).

TRL's trainer needs a model, a tokenizer and accelerate to exist; its loss needs a few attributes.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl")

from megatron_deepseek.rl.advantages import group_advantages
from megatron_deepseek.rl.losses import grpo_loss
from megatron_deepseek.rl_settings import PolicyLossSettings

LOSS_TYPES = {"sample-mean": "grpo", "token-mean": "dapo", "constant": "dr_grpo"}
LONGEST = 9


def random_batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(6, LONGEST, dtype=torch.float64, generator=generator)

    mask_NT = (torch.arange(LONGEST) < torch.randint(1, LONGEST + 1, (6, 1), generator=generator)).double()
    policy_NT = -noise(1.0).abs()
    old_NT = policy_NT + noise(0.5)
    return {"policy_NT": policy_NT, "old_NT": old_NT, "reference_NT": policy_NT + noise(0.3), "mask_NT": mask_NT,
            "rollout_NT": old_NT + noise(0.3),
            "advantages_N": torch.randn(6, dtype=torch.float64, generator=generator)}


def trl_correction(given: dict[str, torch.Tensor], settings: PolicyLossSettings) -> torch.Tensor:
    """What TRL computes with its samples (_generate_and_score_completions, vllm_importance_sampling_mode)."""
    diff = (given["old_NT"] - given["rollout_NT"]) * given["mask_NT"]
    if "sequence" in settings.rollout_correction:
        diff = diff.sum(dim=-1, keepdim=True)
    ratio, threshold = torch.exp(diff), settings.rollout_correction_threshold
    return torch.clamp(ratio, max=threshold) if "truncate" in settings.rollout_correction else ratio.masked_fill(
        ratio > threshold, value=0.0)


class BareTrainer(trl.GRPOTrainer):
    """TRL's trainer with nothing but what its loss reads, which gives the log-probabilities of the test."""

    def __init__(self, logps: torch.Tensor, settings: PolicyLossSettings):
        cispo, corrects = settings.ratio == "cispo", settings.rollout_correction != "none"
        self.logps, self.loss_type = logps, "cispo" if cispo else LOSS_TYPES[settings.loss_aggregation]
        self.args = SimpleNamespace(use_bias_correction_kl=settings.kl == "unbiased", delta=settings.dual_clip,
                                    steps_per_generation=1)
        self.accelerator = SimpleNamespace(num_processes=1, is_main_process=False, gather=lambda x: x,
                                           reduce=lambda x, reduction: x)
        self.importance_sampling_level = "sequence" if settings.ratio == "sequence" else "token"
        self.off_policy_mask_threshold = settings.off_policy_mask_delta
        self.beta = settings.kl_beta if settings.kl != "none" else 0.0
        self.epsilon_low, self.epsilon_high = settings.clip_low, settings.clip_high + cispo  # cispo's is the bound
        self.use_vllm = self.vllm_importance_sampling_correction = corrects
        self.max_completion_length, self.top_entropy_quantile = settings.loss_constant, 1.0
        self.current_gradient_accumulation_steps, self.model = 1, SimpleNamespace(training=True)
        self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *_, **__):
        return self.logps, torch.zeros_like(self.logps), None


def trl_loss(given: dict[str, torch.Tensor], settings: PolicyLossSettings) -> torch.Tensor:
    """TRL's loss in training, without accumulation and on one process."""
    mask = given["mask_NT"].long()
    nothing = torch.zeros(len(mask), 0, dtype=torch.long)
    inputs = {"prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": torch.zeros_like(mask),
              "completion_mask": mask, "advantages": given["advantages_N"], "old_per_token_logps": given["old_NT"],
              "ref_per_token_logps": given["reference_NT"], "num_items_in_batch": mask.sum(),
              "sampling_per_token_logps": given["rollout_NT"],
              "importance_sampling_ratio": trl_correction(given, settings)}
    return BareTrainer(given["policy_NT"], settings).compute_loss(None, inputs)


@pytest.mark.parametrize("options", [
    {}, {"loss_aggregation": "token-mean", "clip_high": 0.28}, {"loss_aggregation": "constant"}, {"kl": "k3"},
    {"kl": "unbiased", "kl_beta": 0.3}, {"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    {"ratio": "cispo", "clip_low": 1.0, "clip_high": 0.5, "loss_aggregation": "token-mean"}, {"dual_clip": 1.7},
    {"off_policy_mask_delta": 0.1}, {"off_policy_mask_delta": 0.1, "kl": "k3", "rollout_correction": "token-truncate"},
    {"rollout_correction": "sequence-mask", "rollout_correction_threshold": 1.1, "loss_aggregation": "token-mean"}],
    ids=lambda options: ", ".join(f"{name} {value}" for name, value in options.items()) or "defaults")
def test_losses_and_gradients_are_those_of_trl(options):
    settings = PolicyLossSettings(loss_constant=LONGEST, **options)
    for seed in range(4):
        given = random_batch(seed)
        policy_NT = given["policy_NT"].requires_grad_()
        found, expected = grpo_loss(**given, settings=settings), trl_loss(given, settings)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        gradients = [torch.autograd.grad(each, policy_NT)[0] for each in (found, expected)]
        assert torch.allclose(*gradients, rtol=1e-12, atol=1e-15) and gradients[0].abs().max() > 0


def test_the_default_advantage_is_that_of_trl():
    """It divides by the sample's spread with 1e-4 added (_generate_and_score_completions)."""
    defaults = trl.GRPOConfig.__dataclass_fields__
    assert defaults["scale_rewards"].default == "group" and defaults["epsilon"].default == 0.2
    assert group_advantages([1, 0], [0, 0]).values_N.tolist() == pytest.approx([0.707007, -0.707007], abs=5e-7)
