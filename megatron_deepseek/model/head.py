"""The output head: from final states to what objectives need of their logits, without ever gathering a vocabulary.

Shapes: B batch, S sequence, H hidden, T = B*S tokens, V vocabulary, v = V/tp this rank's part of it.
"""

from collections.abc import Callable

import torch

from megatron_deepseek.ops.products import Linear, Product
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary import vocab_parallel_cross_entropy
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits


class OutputHead:
    """What a stage's objective asks about the next token's distribution at each position.

    A state is the stream between regions, [B, S, H] or this rank's slice of S under sequence parallelism; what is
    given and comes back for each token is of the whole local sequence, the same on all TP ranks. Everything is
    differentiable in the state and the head's weight.
    """

    def __init__(self, tp: TensorParallel, weight: Callable[[], torch.Tensor], product: Callable[[], Product] = Linear):
        """`weight` gives this rank's rows [v, H] as they are during a forward, `product` what multiplies by them."""
        self.tp, self._weight, self._product = tp, weight, product

    def logits(self, state_BSH: torch.Tensor) -> torch.Tensor:
        """This rank's part of the vocabulary, [B, S, v]."""
        return self._product()(self.tp.enter(state_BSH), self._weight())

    def log_probabilities(self, state_BSH: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """log p(label | state) of each token [B, S], in at least float32. Labels are ids of the whole vocabulary."""
        logits_Tv = self.logits(state_BSH).flatten(0, 1)
        return -vocab_parallel_cross_entropy(logits_Tv, labels_BS.flatten(), self.tp).view_as(labels_BS)

    def entropy(self, state_BSH: torch.Tensor) -> torch.Tensor:
        """Of each token's distribution, in nats, [B, S], in at least float32."""
        return self.for_chunks(state_BSH, VocabularyLogits.entropy)

    def for_chunks(self, state_BSH: torch.Tensor, function: Callable, *per_token: torch.Tensor):
        """`function(logits, *per_token)` of all tokens, chunk by chunk: a tensor [B, S, ...], or a tuple of them.

        The function gets VocabularyLogits of T tokens and the same tokens of each of `per_token` [B, S, ...], and
        gives one or several tensors [T, ...] that are the same on all TP ranks. What it gives for a token may depend
        on that token alone. `per_token` are constants: no gradient goes there.
        """
        logits_BSv = self.logits(state_BSH)
        shape = logits_BSv.shape[:2]
        logits = VocabularyLogits(logits_BSv.flatten(0, 1), self.tp)
        given = function(logits, *(each.flatten(0, 1) for each in per_token))
        if isinstance(given, torch.Tensor):
            return given.unflatten(0, shape)
        return tuple(each.unflatten(0, shape) for each in given)
