"""The divergences of distillation, of log-probabilities: p is the student's distribution, q the teacher's.

    forward-kl   KL(q | p) = sum q (log q - log p)                        arXiv 1503.02531, up to the teacher's entropy
    reverse-kl   KL(p | q) = sum p (log p - log q)                        arXiv 2306.08543, section 2.1
    jsd          beta KL(q | m) + (1 - beta) KL(p | m), m = beta q + (1 - beta) p      arXiv 2306.13649, section 2

Both distributions are softmaxes of logits that were divided by the temperature. No divergence has a factor of its own:
at temperature 2 its gradient is about a quarter of that at 1 (arXiv 1503.02531, section 2).

Of a teacher whose K likeliest ids are known, with what is left for all others, the same divergences are those of K + 1
outcomes: the ids, and "another one". They are never larger than those of the whole vocabulary, and equal where nothing
is left.

Entries are elementwise: any shape of log p and log q, floating point. An entry of probability 0 adds 0, as long as its
logarithm is finite (parallel/vocabulary_logits.py keeps it so).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_deepseek.fine_tuning_settings import DistillationSettings
from megatron_deepseek.parallel.vocabulary_divergence import Divergence
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits


@dataclass(frozen=True)
class ForwardKL:
    """KL(q | p): the student covers all that the teacher says."""

    def terms(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return log_q.exp() * (log_q - log_p)

    def slopes(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return -log_q.exp()


@dataclass(frozen=True)
class ReverseKL:
    """KL(p | q): the student says nothing that the teacher would not."""

    def terms(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return log_p.exp() * (log_p - log_q)

    def slopes(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return self.terms(log_p, log_q)


@dataclass(frozen=True)
class JensenShannon:
    """The generalised Jensen-Shannon divergence; `beta`, between 0 and 1, is the teacher's weight in the mixture."""

    beta: float = 0.5

    def terms(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        log_m = self._log_mixture(log_p, log_q)
        return self.beta * log_q.exp() * (log_q - log_m) + (1 - self.beta) * log_p.exp() * (log_p - log_m)

    def slopes(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (1 - self.beta) * log_p.exp() * (log_p - self._log_mixture(log_p, log_q))

    def _log_mixture(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(log_p + math.log1p(-self.beta), log_q + math.log(self.beta))


def divergence_of(settings: DistillationSettings) -> Divergence:
    """Return the divergence of --kd-loss."""
    made: Mapping[str, Divergence] = {"forward-kl": ForwardKL(), "reverse-kl": ReverseKL(),
                                      "jsd": JensenShannon(settings.kd_jsd_beta)}
    return made[settings.kd_loss]


def divergence_of_top(logits: VocabularyLogits, ids_TK: torch.Tensor, log_q_TK: torch.Tensor, log_rest_T: torch.Tensor,
                      divergence: Divergence) -> torch.Tensor:
    """Return the divergence [T] of a student's logits from a teacher whose probabilities of K ids are known.

    ids_TK int64; log_q_TK: their log-probabilities; log_rest_T: the log of what all other ids have together. The result
    is the same on all TP ranks, in at least float32, with its gradient in the logits.
    """
    log_p_T1, log_q_T1 = logits.log_rest(ids_TK).unsqueeze(-1), log_rest_T.unsqueeze(-1)
    log_p_TK = torch.cat([logits.log_probabilities(ids_TK), log_p_T1], -1)
    return divergence.terms(log_p_TK, torch.cat([log_q_TK, log_q_T1], -1).to(log_p_TK.dtype)).sum(-1)
