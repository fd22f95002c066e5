"""The objective of samples with advantages, over the documents of packed rows: losses.py's terms, in any layout.

Each sample is a document of a row; its completion's labels have the weight 1, all others 0. Denominators are numbers
of the global batch that are known before the first forward: what the policy's term leaves out (clipped tokens, samples
that are too far off) still counts.

MTP modules are neither run nor trained: the papers' losses are of the model's own predictions. They fall behind a
policy that moves away from them, so that fewer of their drafts are accepted; that costs time and changes no sample.

Shapes: B rows, S tokens of each on this context rank, D documents of a row, M ids that a token was drawn among.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Contribution, Rows
from megatron_deepseek.rl.losses import SampledTokens, TokenLosses, k3, token_losses, total
from megatron_deepseek.rl.samples import ADVANTAGES, KEPT_IDS, OLD, REFERENCE, ROLLOUT
from megatron_deepseek.rl_settings import PolicyLossSettings
from megatron_deepseek.training.objective import Losses, Objective
from megatron_deepseek.training.scoring import Distribution


@dataclass(frozen=True)
class PolicyLosses(Losses):
    """The loss of a global batch, and what is reported beside it: means over its tokens; `off_policy_masked` over its
    samples.
    """

    @property
    def objective(self) -> Mapping[str, float]:
        return {**self.reports, "completion_length": self.counts["tokens"] / (self.counts["samples"] or 1.0)}

    @property
    def num_labels(self) -> int:
        """Return how many tokens the completions of the batch have."""
        return round(self.counts["tokens"])


class GroupRelative(Objective):
    """GRPO and its kin, by the settings.

    A batch may have OLD, ROLLOUT, REFERENCE and KEPT_IDS among its inputs; ADVANTAGES, and what the settings need, it
    must have. Without OLD the policy of the moment is the old one: the first update with a rollout.
    `entropy`: whether the entropy of the predictions is reported too, which costs another product with the head.
    """

    def __init__(self, settings: PolicyLossSettings, entropy: bool = False):
        self.settings, self.entropy = settings, entropy
        self.inputs = (ADVANTAGES, *((REFERENCE,) if settings.kl != "none" else ()),
                       *((ROLLOUT,) if settings.rollout_correction != "none" else ()))

    def counts(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        weights_BS = rows.weights_BS.double()
        return {"tokens": weights_BS.sum(), "samples": (rows.per_document(weights_BS) > 0).sum()}

    def reported(self, rows: Rows) -> tuple[str, ...]:
        settings = self.settings
        return ("grpo_loss", *(("kl",) if settings.kl != "none" else ()), "clip_low", "clip_high", "kl_to_old",
                *(("dual_clip",) if settings.dual_clip is not None else ()),
                *(("off_policy_masked",) if settings.off_policy_mask_delta is not None else ()),
                *(("rollout_kl", "rollout_difference") if ROLLOUT in rows.inputs else ()),
                *(("rollout_correction",) if settings.rollout_correction != "none" else ()),
                *(("entropy",) if self.entropy else ()))

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        tokens = self.tokens(predictions, rows)
        terms = token_losses(tokens, self.settings)
        loss = total(terms, tokens, self.settings, counts)
        measured = measures(tokens, terms, self.settings)
        if self.entropy:
            with torch.no_grad():
                measured["entropy"] = predictions.entropy(temperature=self.settings.temperature)
        factors = {"off_policy_masked": tokens.weights / (tokens.lengths * (counts["samples"] or 1.0))}
        of_tokens = tokens.weights / (counts["tokens"] or 1.0)
        means = {name: (measured[name].detach() * factors.get(name, of_tokens)).sum()
                 for name in self.reported(rows)[1:]}
        return Contribution(loss, {"grpo_loss": loss, **means})

    def losses(self, reports: Mapping[str, float], balance_loss: float, counts: Mapping[str, float]) -> PolicyLosses:
        return PolicyLosses(reports, balance_loss, counts)

    def distribution(self, batch: Batch) -> Distribution:
        """Return the distribution by which old and reference log-probabilities of a batch must be scored."""
        return Distribution(self.settings.temperature, KEPT_IDS if KEPT_IDS in batch.per_token else None)

    def tokens(self, predictions: Predictions, rows: Rows) -> SampledTokens:
        """Return what the losses need to know of this micro-batch's tokens, float64 [B, S]."""
        found_BS = predictions.log_probabilities(temperature=self.settings.temperature,
                                                 kept_BSM=rows.inputs.get(KEPT_IDS)).double()
        given = {name: rows.inputs[name].double() for name in (OLD, ROLLOUT, REFERENCE) if name in rows.inputs}
        return SampledTokens(found_BS, given.get(OLD, found_BS.detach()), rows.inputs[ADVANTAGES].double(),
                             rows.weights_BS.double(), rows, given.get(ROLLOUT), given.get(REFERENCE))


def measures(tokens: SampledTokens, terms: TokenLosses, settings: PolicyLossSettings) -> dict[str, torch.Tensor]:
    """Return what can be reported of each token, by name.

    `clip_low`, `clip_high`, `dual_clip`: whether its ratio is outside that bound, where that takes its gradient away;
    CISPO bounds the ratio of every token. `kl_to_old`, `rollout_kl`: k3's estimates of KL(old || policy) and
    KL(engine || old). `rollout_difference`: |log p_old - log p_engine|. A maximum would not add up over ranks.
    """
    ratio, advantages = terms.ratio, tokens.advantages
    any_sign = settings.ratio == "cispo"
    found = {"kl": terms.divergence, "kl_to_old": k3(tokens.log_ratio), "rollout_correction": terms.correction,
             "clip_low": (ratio < 1 - settings.clip_low) & ((advantages < 0) | any_sign),
             "clip_high": (ratio > 1 + settings.clip_high) & ((advantages > 0) | any_sign),
             "off_policy_masked": 1 - terms.kept}
    if settings.dual_clip is not None:
        found["dual_clip"] = (ratio > settings.dual_clip) & (advantages < 0)
    if tokens.rollout is not None:
        mismatch = tokens.difference(tokens.old, tokens.rollout)
        found |= {"rollout_kl": k3(mismatch), "rollout_difference": mismatch.abs()}
    return found
