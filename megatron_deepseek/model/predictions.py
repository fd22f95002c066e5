"""What an objective gets to see of a model: the predictions of a micro-batch's tokens, logits being made on the way.

Shapes: B rows, S tokens of each on this context rank, M = 1 + MTP depth predictions of each token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_deepseek.model.head import OutputHead


@dataclass(frozen=True, eq=False)
class Predictions:
    """`states`: what the head makes the main prediction and each MTP depth's of; depth 0 is the main one.

    All tensor-parallel ranks get the same numbers of all this context rank's tokens, and make the same of them.
    """

    states: list[torch.Tensor]
    head: OutputHead
    labels_BMS: torch.Tensor

    @property
    def num_depths(self) -> int:
        """How many MTP predictions there are beside the main one."""
        return len(self.states) - 1

    def log_probabilities(self, depth: int = 0) -> torch.Tensor:
        """Return log p(label) of each token, [B, S], in at least float32, with its gradient."""
        return self.head.log_probabilities(self.states[depth], self.labels_BMS[:, depth])

    def entropy(self, depth: int = 0) -> torch.Tensor:
        """Return the entropy in nats of each token's prediction, [B, S], with its gradient."""
        return self.head.entropy(self.states[depth])

    def for_chunks(self, function: Callable, *per_token: torch.Tensor, depth: int = 0):
        """Return what `function` makes of the logits of each chunk of tokens, [B, S, ...]: see OutputHead."""
        return self.head.for_chunks(self.states[depth], function, *per_token)
