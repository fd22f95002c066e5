"""A sample of a rollout: one completion of a prompt, with what the engine said of it while it was drawn."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_deepseek.model.positions import REPLAYED as REPLAYED


@dataclass(frozen=True, eq=False)
class Sample:
    """One of the completions of a prompt.

    `group`: the number of its prompt in the rollout. `tokens`: the completion's ids, with the one that ended it; `text`
    is what they say without that one. `finish_reason`: "stop", or "length" for one that was cut off.
    `log_probabilities`: of each token of the completion, float64 list, under the distribution that it was drawn from:
    the softmax of logits divided by the temperature, among the tokens that top_k, top_p and min_p left.
    `experts`: by layer ("model.layers.3.mlp") the experts of every token that went through the model, the prompt's and
    the completion's but the last one: integers [tokens, K]; None where routing is not kept. `kept_ids`: of each token
    of the completion the ids that it was drawn among, int32; None where the sampling mask is not kept.
    """

    group: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: str
    log_probabilities: tuple[float, ...]
    experts: Mapping[str, torch.Tensor] | None = None
    kept_ids: tuple[torch.Tensor, ...] | None = None

    @property
    def finished(self) -> bool:
        """Return whether the completion came to its end."""
        return self.finish_reason == "stop"


# The names of what a batch has beside tokens and labels, all at the position whose label they are about: [B, S].
ADVANTAGES = "advantages"  # of the label's sample; 0 where there is none
ROLLOUT = "rollout_log_probabilities"  # of the label, as the engine drew it
OLD = "old_log_probabilities"  # of the label, by the training model before the first update with this rollout
REFERENCE = "reference_log_probabilities"  # of the label, by the reference model
KEPT_IDS = "kept_ids"  # [B, S, M] int32: among which ids the label was drawn, -1 behind the last one; a row of -1: all
# And REPLAYED, [B, S, L, K] integers: the token's experts in each of L MoE layers, -1: let it choose
