"""The losses of preference tuning, of sums of log-probabilities: papers' formulas, with TRL's names and conventions.

    dpo     -log sigmoid(beta d)                         arXiv 2305.18290, eq. 7; label smoothing as in its appendix
    hinge   max(0, 1 - beta d)                           SLiC, arXiv 2305.10425, as TRL has it
    ipo     (d' - 1 / (2 beta))^2                        arXiv 2310.12036, eq. 17, of means over tokens as in TRL
    orpo    -beta log sigmoid(log odds ratio)            arXiv 2403.07691, eqs. 6 and 7, of means over tokens
    simpo   -log sigmoid(beta (a_w - a_l) - gamma)       arXiv 2405.14734, eq. 6, of means over tokens
    kto     1 - sigmoid(+-(beta r - beta z))             arXiv 2402.01306, eq. 8

r = log p / p_reference of an answer, d = r_chosen - r_rejected; d' is that of means, a are means of log p.

Shapes: P pairs, 2 sides: chosen, rejected; N answers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_deepseek.fine_tuning_settings import PreferenceSettings


@dataclass(frozen=True, eq=False)
class PairScores:
    """The log-probabilities of both sides of pairs, floating point [P, 2]: sums over the answers' tokens of the policy
    and of the reference (zeros without one), and the number of tokens, which is not 0.
    """

    policy_P2: torch.Tensor
    reference_P2: torch.Tensor
    lengths_P2: torch.Tensor

    @property
    def ratios_P2(self) -> torch.Tensor:
        return self.policy_P2 - self.reference_P2

    @property
    def means_P2(self) -> torch.Tensor:
        return self.policy_P2 / self.lengths_P2


def _difference(x_P2: torch.Tensor) -> torch.Tensor:
    return x_P2[..., 0] - x_P2[..., 1]


def smoothed(margin_P: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return -log sigmoid(margin), where a part `smoothing` of the labels is taken to be the wrong way round."""
    return -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)


def dpo(scores: PairScores, settings: PreferenceSettings) -> torch.Tensor:
    return smoothed(settings.beta * _difference(scores.ratios_P2), settings.label_smoothing)


def hinge(scores: PairScores, settings: PreferenceSettings) -> torch.Tensor:
    return F.relu(1 - settings.beta * _difference(scores.ratios_P2))


def ipo(scores: PairScores, settings: PreferenceSettings) -> torch.Tensor:
    return (_difference(scores.ratios_P2 / scores.lengths_P2) - 1 / (2 * settings.beta))**2


def orpo(scores: PairScores, settings: PreferenceSettings) -> torch.Tensor:
    means_P2 = scores.means_P2
    return -settings.beta * F.logsigmoid(_difference(means_P2 - log_of_rest(means_P2)))


def simpo(scores: PairScores, settings: PreferenceSettings) -> torch.Tensor:
    margin_P = settings.beta * _difference(scores.means_P2) - settings.simpo_gamma
    return smoothed(margin_P, settings.label_smoothing)


PAIR_LOSSES: Mapping[str, Callable[[PairScores, PreferenceSettings], torch.Tensor]] = {
    "dpo": dpo, "hinge": hinge, "ipo": ipo, "orpo": orpo, "simpo": simpo}


def rewards(scores: PairScores, settings: PreferenceSettings) -> torch.Tensor:
    """Return the implicit rewards [P, 2]: beta times the log-ratio, without a reference beta times the mean log p."""
    return settings.beta * (scores.ratios_P2 if settings.has_reference else scores.means_P2)


def kto(ratios_N: torch.Tensor, signs_N: torch.Tensor, divergence: torch.Tensor, settings: PreferenceSettings
        ) -> torch.Tensor:
    """Return the loss of each answer [N]; `signs_N` are 1 for good and -1 for bad ones, `divergence` is z."""
    more = settings.desirable_weight - settings.undesirable_weight
    weights_N = settings.undesirable_weight + more * (signs_N > 0).to(ratios_N.dtype)
    return weights_N * (1 - torch.sigmoid(signs_N * settings.beta * (ratios_N - divergence)))


def log_of_rest(log_p: torch.Tensor) -> torch.Tensor:
    """Return log(1 - p) of log p < 0, accurate at both ends (M. Maechler, "Accurately computing log(1 - exp(-|a|))").

    A log p of 0, which rounding may give, counts as the largest that is less.
    """
    below = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return torch.where(below > -math.log(2), torch.log(-torch.expm1(below)), torch.log1p(-torch.exp(below)))
