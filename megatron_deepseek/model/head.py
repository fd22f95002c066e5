"""The output head: from final states to what objectives need of their logits, without ever gathering a vocabulary.

Logits are the largest tensors of a model: 1 GiB in bfloat16 for V3 at 4,096 tokens, for each prediction, and a backward
needs several times that. So where they are many they are computed by chunks of tokens, and again in the backward
(parallel/vocabulary_chunks.py).

Shapes: B batch, S sequence, H hidden, T = B*S tokens, V vocabulary, v = V/tp this rank's part of it,
M ids that a token was drawn among.
"""

from collections.abc import Callable
from functools import partial

import torch

from megatron_deepseek.ops.cross_entropy import CrossEntropy
from megatron_deepseek.ops.precision_recipe import Linear
from megatron_deepseek.parallel import vocabulary_chunks
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary import vocab_parallel_cross_entropy
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits

# The size of a rank's logits of one chunk, unless the number of tokens is given. Chunks cost one more GEMM of the head,
# however many there are, so the bound can be low. But the head's GEMMs need a thousand tokens to run at full rate: with
# V3's 129,280 ids there are 1,038 of them in bfloat16.
LOGITS_BYTES = 256 * 2**20


def default_chunk_size(rows: int, dtype: torch.dtype) -> int:
    """Return how many tokens' logits of `rows` ids fill LOGITS_BYTES, a multiple of 128 if there are that many."""
    most = max(1, LOGITS_BYTES // (rows * dtype.itemsize))
    return most // 128 * 128 or most


class OutputHead:
    """The next token's distribution at each position, for a stage's objective.

    A state is the stream between TP regions, [B, S, H] or this rank's slice of S under sequence parallelism. Arguments
    and results by token are for the whole local sequence, the same on all TP ranks. Everything is differentiable in the
    state and the head's weight.
    """

    def __init__(self, tp: TensorParallel, weight: Callable[[], torch.Tensor], gemm: Callable[[], Linear] = Linear,
                 chunk_size: int | None = None):
        """Take `weight`, which gives this rank's rows [v, H] during a forward, and `gemm`, which gives their GEMM.

        `chunk_size`: the number of tokens whose logits are computed at once; None for `default_chunk_size`.
        """
        self.tp, self.chunk_size, self._weight, self._gemm = tp, chunk_size, weight, gemm
        self.cross_entropy = CrossEntropy()

    def rows(self) -> torch.Tensor:
        """Return this rank's rows of the weight, [v, H], in what is computed in; to be called during a forward."""
        return self._weight()

    def inputs(self, state_BSH: torch.Tensor) -> torch.Tensor:
        """Return the state of the whole local sequence, [B, S, H], the same on all TP ranks."""
        return self.tp.enter(state_BSH)

    def logits(self, state_BSH: torch.Tensor) -> torch.Tensor:
        """Return the logits of this rank's part of the vocabulary, [B, S, v]."""
        return self._gemm()(self.tp.enter(state_BSH), self._weight())

    def log_probabilities(self, state_BSH: torch.Tensor, labels_BS: torch.Tensor, temperature: float = 1.0,
                          kept_BSM: torch.Tensor | None = None) -> torch.Tensor:
        """Return log p(label | state) of each token [B, S], in at least float32; labels are global ids.

        The distribution is the softmax of logits / temperature over the vocabulary or, where `kept_BSM` is given, over
        the ids that it has for a token: VocabularyLogits.log_probabilities_among. These two go through autograd by
        chunks, and defer no gradient of the weight; without them the head's own backward does.
        """
        if temperature != 1 or kept_BSM is not None:
            kept = () if kept_BSM is None else (kept_BSM,)
            return self.for_chunks(state_BSH, partial(_drawn, temperature=temperature), labels_BS, *kept)
        x_TH, weight_vH, chunk_size = self._chunks(state_BSH)
        if chunk_size is None:
            logits_Tv = self._gemm()(x_TH, weight_vH)
            return -vocab_parallel_cross_entropy(logits_Tv, labels_BS.flatten(), self.tp,
                                                 self.cross_entropy).view_as(labels_BS)
        return vocabulary_chunks.log_probabilities(x_TH, weight_vH, labels_BS.flatten(), chunk_size, self.tp,
                                                   self._gemm().defer, self.cross_entropy).view_as(labels_BS)

    def entropy(self, state_BSH: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Return the entropy of each token's softmax of logits / temperature, in nats, [B, S], in at least float32."""
        return self.for_chunks(state_BSH, lambda logits: logits.at_temperature(temperature).entropy())

    def for_chunks(self, state_BSH: torch.Tensor, function: Callable, *per_token: torch.Tensor):
        """Return `function(logits, *per_token)` for all tokens, by chunks: a tensor [B, S, ...], or a tuple of them.

        The function gets VocabularyLogits of T tokens and the same tokens of each of `per_token` [B, S, ...], and
        returns one or several tensors [T, ...] that are the same on all TP ranks. Its result for a token may depend on
        that token alone. `per_token` are constants: they get no gradient.
        """
        x_TH, weight_vH, chunk_size = self._chunks(state_BSH)
        per_token = tuple(each.flatten(0, 1) for each in per_token)
        if chunk_size is None:
            given = function(VocabularyLogits(self._gemm()(x_TH, weight_vH), self.tp), *per_token)
        else:
            given = vocabulary_chunks.map_chunks(x_TH, weight_vH, chunk_size, self.tp, function, per_token)
        shape = len(state_BSH), -1
        return given.unflatten(0, shape) if isinstance(given, torch.Tensor) else tuple(
            each.unflatten(0, shape) for each in given)

    def _chunks(self, state_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int | None]:
        """Return the head's input [T, H] of the whole sequence, its weight, and the chunk size, None for one chunk."""
        x_TH, weight_vH = self.tp.enter(state_BSH).flatten(0, 1), self._weight()
        chunk_size = self.chunk_size or default_chunk_size(len(weight_vH), x_TH.dtype)
        return x_TH, weight_vH, chunk_size if chunk_size < len(x_TH) else None


def _drawn(logits: VocabularyLogits, labels_T: torch.Tensor, kept_TM: torch.Tensor | None = None, *,
           temperature: float) -> torch.Tensor:
    """Return log p of labels that were drawn at a temperature, and among the kept ids where there are any."""
    logits = logits.at_temperature(temperature)
    return logits.log_probabilities(labels_T) if kept_TM is None else logits.log_probabilities_among(labels_T, kept_TM)


class ScoreHead:
    """A reward model's head: one number for each position, from its state as `OutputHead` gets it."""

    def __init__(self, tp: TensorParallel, linear: Callable[[torch.Tensor], torch.Tensor]):
        """Take `linear`, which maps states [B, S, H] of this rank's slice of the sequence to [B, S, 1]."""
        self.tp, self.linear = tp, linear

    def scores(self, state_BSH: torch.Tensor) -> torch.Tensor:
        """Return the scores of the whole local sequence, [B, S], in at least float32, the same on all TP ranks."""
        score_BS1 = self.linear(state_BSH)
        wide = torch.promote_types(score_BS1.dtype, torch.float32)
        return self.tp.whole_sequence(score_BS1).squeeze(-1).to(wide)
