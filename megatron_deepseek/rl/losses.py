"""The loss of samples by their advantages: GRPO and its kin, on plain tensors. docs/grpo.md compares the formulas.

Of each token of a completion, with rho = p / p_old, x = log(p_reference / p) and the sample's advantage A:

    policy      -min(rho A, clip(rho, 1 - low, 1 + high) A)     GRPO, arXiv 2402.03300, eq. 3
                rho of a sample: exp(mean of log rho)           GSPO, arXiv 2507.18071, eq. 7
                -stopped(clip(rho)) A log p                     CISPO, arXiv 2506.13585, eq. 4
                if A < 0 no more than -c A                      dual clip, arXiv 1912.09729, eq. 5
    divergence  exp(x) - x - 1                                  k3, arXiv 2402.03300, eq. 4
                rho (exp(x) - x - 1)                            unbiased, arXiv 2512.02556, section 3.1

The policy's term is multiplied by 0 for samples that are too far off (arXiv 2512.02556, section 3.1), and by what
corrects that the engine that drew a token gave it another probability than the training model.

The functions take tokens of any shape, and get sums over a sample from `Samples`: of padded ones here, of packed rows
in objective.py. So one text has the formulas of both.

Shapes: ... tokens, of which N samples have T each where they are padded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from megatron_deepseek.rl_settings import PolicyLossSettings


class Samples(Protocol):
    """The samples that tokens belong to. Gradients go through both methods."""

    def per_document(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of each sample over all its tokens."""

    def of_documents(self, x: torch.Tensor) -> torch.Tensor:
        """Return what x has for each token's sample, in a shape that broadcasts to that of the tokens."""


class PaddedSamples:
    """The samples of tokens [N, T], one in each row."""

    def per_document(self, x_NT: torch.Tensor) -> torch.Tensor:
        return x_NT.sum(-1)

    def of_documents(self, x_N: torch.Tensor) -> torch.Tensor:
        return x_N.unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class SampledTokens:
    """What a loss needs to know of tokens, all of one shape, floating point.

    `policy`: log p, with its gradient; `old`: that before the first update with these samples; `rollout`: that of the
    engine; `reference`: that of the reference model; None where there is none. `advantages`: of the token's sample.
    `weights`: 1 for a token of a completion, 0 for any other, whose log-probabilities may be anything.
    """

    policy: torch.Tensor
    old: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    samples: Samples
    rollout: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    @cached_property
    def log_ratio(self) -> torch.Tensor:
        """Return log(p / p_old) of each token, 0 where there is no weight."""
        return self.difference(self.policy, self.old)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Return how many tokens each token's sample has, at least 1."""
        return self.sample_sum(torch.ones_like(self.weights)).clamp(min=1)

    @property
    def behaviour(self) -> torch.Tensor:
        """Return log p of what drew the tokens: of the engine, where that is known."""
        return self.old if self.rollout is None else self.rollout

    def difference(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a - b, 0 where there is no weight."""
        return (a - b).where(self.weights != 0, 0)

    def sample_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of x over each token's sample."""
        return self.samples.of_documents(self.samples.per_document(x * self.weights))

    def sample_mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean of x over each token's sample."""
        return self.sample_sum(x) / self.lengths


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """The terms of each token, before they are weighted and added up; all but the first two are constants.

    `policy` and `divergence`: the loss is the first and beta times the second. `ratio`: what was clipped. `kept`: 0 for
    tokens of a sample that is too far off, else 1. `correction`: of the engine's probability.
    """

    policy: torch.Tensor
    divergence: torch.Tensor
    ratio: torch.Tensor
    kept: torch.Tensor
    correction: torch.Tensor


def grpo_loss(policy_NT: torch.Tensor, advantages_N: torch.Tensor, mask_NT: torch.Tensor,
              settings: PolicyLossSettings = PolicyLossSettings(), *, old_NT: torch.Tensor | None = None,
              reference_NT: torch.Tensor | None = None, rollout_NT: torch.Tensor | None = None) -> torch.Tensor:
    """Return the loss of a batch of N samples, a scalar with its gradient in `policy_NT`.

    `policy_NT`, and where there are any `old_NT`, `reference_NT` and `rollout_NT`, are log-probabilities of the
    completions' tokens, of SampledTokens' four models; without `old_NT` the policy is the old one. `mask_NT` is 1 for
    tokens that count. A sample without any is not counted, as one that was cut off under --overlong mask.

    Training computes the same of packed rows (objective.py). Raise ValueError for settings that need a model which is
    not given.
    """
    old_NT = policy_NT.detach() if old_NT is None else old_NT
    weights_NT = mask_NT.to(policy_NT.dtype)
    advantages_NT = advantages_N.to(policy_NT.dtype).unsqueeze(-1).expand_as(policy_NT)
    tokens = SampledTokens(policy_NT, old_NT, advantages_NT, weights_NT, PaddedSamples(), rollout_NT, reference_NT)
    counts = {"tokens": weights_NT.sum(), "samples": (weights_NT.sum(-1) > 0).sum()}
    return total(token_losses(tokens, settings), tokens, settings, counts)


def token_losses(tokens: SampledTokens, settings: PolicyLossSettings) -> TokenLosses:
    """Return the terms of each token. Raise ValueError for settings that need a model which is not given."""
    _check(tokens, settings)
    log_ratio = tokens.sample_mean(tokens.log_ratio) if settings.ratio == "sequence" else tokens.log_ratio
    ratio = log_ratio.exp()
    kept, correction = close_enough(tokens, settings), correction_weights(tokens, settings)
    policy = policy_terms(ratio, tokens, settings) * kept * correction
    return TokenLosses(policy, divergence_terms(tokens, settings), ratio.detach(), kept, correction)


def _check(tokens: SampledTokens, settings: PolicyLossSettings) -> None:
    if settings.kl != "none" and tokens.reference is None:
        raise ValueError(f"--kl {settings.kl} needs the reference model's log-probabilities, and there are none")
    if settings.rollout_correction != "none" and tokens.rollout is None:
        raise ValueError(f"--rollout-correction {settings.rollout_correction} needs the engine's log-probabilities, "
                         "and there are none")


def policy_terms(ratio: torch.Tensor, tokens: SampledTokens, settings: PolicyLossSettings) -> torch.Tensor:
    """Return the loss of each token by its ratio, or its sample's."""
    advantages, clipped = tokens.advantages, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    if settings.ratio == "cispo":
        return -clipped.detach() * advantages * tokens.policy.where(tokens.weights != 0, 0)
    worse = torch.minimum(ratio * advantages, clipped * advantages)
    if settings.dual_clip is not None:
        worse = worse.maximum(settings.dual_clip * advantages).where(advantages < 0, worse)
    return -worse


def divergence_terms(tokens: SampledTokens, settings: PolicyLossSettings) -> torch.Tensor:
    """Return the estimate of KL(policy || reference) of each token, zeros without a reference.

    The unbiased one's ratio is each token's own, whatever the policy's term takes, and has a gradient: the gradient of
    the whole is then rho log(p / p_reference) times that of log p.
    """
    if settings.kl == "none":
        return torch.zeros_like(tokens.log_ratio)
    terms = k3(tokens.difference(tokens.reference, tokens.policy))
    return terms * tokens.log_ratio.exp() if settings.kl == "unbiased" else terms


def k3(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x) - x - 1, at least 0: its mean over draws from p estimates KL(p || q) for x = log(q / p)."""
    return torch.expm1(x) - x


def close_enough(tokens: SampledTokens, settings: PolicyLossSettings) -> torch.Tensor:
    """Return 0 for each token of a sample with A < 0 whose mean of log(p_behaviour / p) is above the bound, else 1.

    The paper takes for p_behaviour what the engine returned, so that both sources of a distance count: updates since,
    and two programs that compute one model.
    """
    if settings.off_policy_mask_delta is None:
        return torch.ones_like(tokens.weights)
    distance = tokens.sample_mean(tokens.difference(tokens.behaviour, tokens.policy.detach()))
    return ((tokens.advantages >= 0) | (distance <= settings.off_policy_mask_delta)).to(tokens.weights.dtype)


def correction_weights(tokens: SampledTokens, settings: PolicyLossSettings) -> torch.Tensor:
    """Return p_old / p_rollout of each token or sample, truncated at the threshold, or 0 above it; 1 without any."""
    if settings.rollout_correction == "none":
        return torch.ones_like(tokens.weights)
    level, _, bound = settings.rollout_correction.partition("-")
    difference = tokens.difference(tokens.old, tokens.rollout)
    weights = (tokens.sample_sum(difference) if level == "sequence" else difference).exp()
    threshold = settings.rollout_correction_threshold
    return weights.clamp(max=threshold) if bound == "truncate" else weights.where(weights <= threshold, 0)


def total(terms: TokenLosses, tokens: SampledTokens, settings: PolicyLossSettings,
          counts: Mapping[str, torch.Tensor | float]) -> torch.Tensor:
    """Return the sum of the terms of these tokens over the numbers of the whole batch: its "tokens" and "samples"."""
    losses = terms.policy + settings.kl_beta * terms.divergence if settings.kl != "none" else terms.policy
    return (losses * shares(tokens, settings, counts)).sum()


def shares(tokens: SampledTokens, settings: PolicyLossSettings, counts: Mapping[str, torch.Tensor | float]
           ) -> torch.Tensor:
    """Return the factor of each token's term in the loss.

    sample-mean: the mean over samples of the mean over their tokens (GRPO). token-mean: over all tokens of the batch
    (DAPO, arXiv 2503.14476, eq. 8). constant: the mean over samples of their sums divided by a constant (Dr. GRPO).
    """
    tokens_or_one, samples_or_one = counts["tokens"] or 1.0, counts["samples"] or 1.0
    if settings.loss_aggregation == "token-mean":
        return tokens.weights / tokens_or_one
    if settings.loss_aggregation == "constant":
        assert settings.loss_constant, "--loss-aggregation constant has no --loss-constant"
        return tokens.weights / (settings.loss_constant * samples_or_one)
    assert settings.loss_aggregation == "sample-mean", settings.loss_aggregation
    return tokens.weights / (tokens.lengths * samples_or_one)
