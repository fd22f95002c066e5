"""What an objective sees of a model: predictions for a micro-batch's tokens, with logits computed on request.

Shapes: B rows, S tokens of each on this context rank, M = 1 + MTP depth predictions of each token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_deepseek.model.head import OutputHead, ScoreHead


@dataclass(frozen=True, eq=False)
class Predictions:
    """The final states of the main prediction, which is depth 0, and each MTP depth, with the head to read them: a
    reward model's gives scores, all others' the rest.

    All tensor-parallel ranks get the same numbers for all of this context rank's tokens, and must compute the same from
    them.
    """

    states: list[torch.Tensor]
    head: OutputHead | ScoreHead
    labels_BMS: torch.Tensor

    @property
    def num_depths(self) -> int:
        """Return how many MTP predictions there are besides the main one."""
        return len(self.states) - 1

    def log_probabilities(self, depth: int = 0, temperature: float = 1.0, kept_BSM: torch.Tensor | None = None
                          ) -> torch.Tensor:
        """Return log p(label) of each token, [B, S], in at least float32, with its gradient.

        The distribution is the softmax of logits / temperature, where `kept_BSM` is given among the ids of its last
        dimension, as a sampler drew from it; -1 is no id, and a token with nothing else has the whole vocabulary.
        """
        return self.head.log_probabilities(self.states[depth], self.labels_BMS[:, depth], temperature, kept_BSM)

    def scores(self) -> torch.Tensor:
        """Return a reward model's score of each token, [B, S], in at least float32, with its gradient."""
        return self.head.scores(self.states[0])

    def entropy(self, depth: int = 0, temperature: float = 1.0) -> torch.Tensor:
        """Return the entropy in nats of each token's softmax of logits / temperature, [B, S], with its gradient."""
        return self.head.entropy(self.states[depth], temperature)

    def for_chunks(self, function: Callable, *per_token: torch.Tensor, depth: int = 0):
        """Return what `function` makes of the logits of each chunk of tokens, [B, S, ...]: see OutputHead."""
        return self.head.for_chunks(self.states[depth], function, *per_token)
