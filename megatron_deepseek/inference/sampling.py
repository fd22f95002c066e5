"""From a row of logits to the next token.

Every request has a generator of its own, of which each token takes one number. So a draw depends on the request's seed,
its tokens so far and their logits, and on nothing else in the batch.

Shapes: V vocabulary, R rows.
"""

import torch

from megatron_deepseek.inference.request import Sequence
from megatron_deepseek.inference.sampling_parameters import SamplingParameters

LIKELIEST = 256  # how many of the likeliest tokens are sorted at first, to find the smallest set of `top_p`


def next_token(logits_V: torch.Tensor, sequence: Sequence) -> int:
    """Return the token that the sequence's parameters and generator choose."""
    parameters = sequence.parameters
    logits_V = adjusted(logits_V, sequence)
    if parameters.greedy:
        return int(logits_V.argmax())
    weights, ids = candidates(logits_V / parameters.temperature, parameters)
    return int(draw(weights, ids, torch.rand((), dtype=torch.float64, generator=sequence.generator)))


def is_plain_greedy(sequence: Sequence) -> bool:
    """Return whether the next token is simply the likeliest of the raw logits."""
    parameters = sequence.parameters
    return parameters.greedy and not (parameters.penalised or parameters.logit_bias or sequence.constraint is not None
                                      or sequence.num_answered < parameters.min_tokens)


def adjusted(logits_V: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Return float32 logits after penalties, biases, the ban of ends before `min_tokens`, and the grammar."""
    parameters = sequence.parameters
    raw_V, logits_V = logits_V, logits_V.to(torch.promote_types(logits_V.dtype, torch.float32), copy=True)
    if parameters.penalised:
        _penalise(logits_V, sequence)
    if parameters.logit_bias:
        ids = torch.tensor(list(parameters.logit_bias), device=logits_V.device)
        logits_V[ids] += torch.tensor(list(parameters.logit_bias.values()), device=logits_V.device).to(logits_V.dtype)
    if sequence.num_answered < parameters.min_tokens and sequence.request.ends:
        logits_V[torch.tensor(list(sequence.request.ends), device=logits_V.device)] = float("-inf")
    return logits_V if sequence.constraint is None else _constrained(logits_V, raw_V, sequence)


def _constrained(logits_V: torch.Tensor, raw_V: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Return the logits of the tokens that the grammar allows, raw ones where all of these are banned otherwise."""
    banned_V = ~sequence.constraint.allowed(len(logits_V)).to(logits_V.device)
    masked_V = logits_V.masked_fill(banned_V, float("-inf"))
    return masked_V if masked_V.isfinite().any() else raw_V.to(logits_V.dtype).masked_fill(banned_V, float("-inf"))


def _penalise(logits_V: torch.Tensor, sequence: Sequence) -> None:
    """Apply, in place, the repetition penalty to all tokens so far and the other two to those of the answer.

    The first divides positive logits and multiplies negative ones (arXiv 1909.05858); the others are OpenAI's.
    """
    parameters = sequence.parameters
    if parameters.repetition_penalty != 1:
        seen = torch.tensor(list({*sequence.request.prompt, *sequence.counts}), device=logits_V.device)
        logits = logits_V[seen]
        logits_V[seen] = torch.where(logits > 0, logits / parameters.repetition_penalty,
                                     logits * parameters.repetition_penalty)
    if sequence.counts:
        ids = torch.tensor(list(sequence.counts), device=logits_V.device)
        counts = torch.tensor(list(sequence.counts.values()), device=logits_V.device).to(logits_V.dtype)
        logits_V[ids] -= parameters.frequency_penalty * counts + parameters.presence_penalty


def candidates(scaled_V: torch.Tensor, parameters: SamplingParameters) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weights of the tokens that top_k, top_p and min_p leave, and their ids; None for all ids in order.

    Weights are probabilities up to a common factor. top_p counts within what top_k leaves.
    """
    size = len(scaled_V)
    top_k = min(parameters.top_k or size, size)
    if top_k == size and parameters.top_p == 1:
        weights, ids = scaled_V.softmax(-1), None
    else:
        weights, ids = _nucleus(scaled_V, top_k, parameters.top_p)
    if parameters.min_p:
        weights = weights.where(weights >= parameters.min_p * weights.max(), 0)
    return weights, ids


def _nucleus(scaled_V: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest set of likeliest tokens whose share of the first `top_k` reaches `top_p`.

    Sorting a few of them is mostly enough: the whole vocabulary is sorted only where their share is too small.
    """
    number = min(top_k, LIKELIEST if top_k == len(scaled_V) else top_k)
    probabilities_V = scaled_V.softmax(-1)
    weights, ids = probabilities_V.topk(number)
    total = weights.sum() if top_k < len(scaled_V) else probabilities_V.sum()
    if number < top_k and weights.sum() < top_p * total:
        weights, ids = probabilities_V.sort(descending=True)
    before = weights.cumsum(-1) - weights
    return weights.where(before < top_p * total, 0), ids


def draw(weights: torch.Tensor, ids: torch.Tensor | None, numbers: torch.Tensor) -> torch.Tensor:
    """Return, for each number, uniform in [0, 1), the id whose part of the sum of weights has it.

    Parts lie in the order of the weights. Without `ids` the place is the id.
    """
    ends = weights.double().cumsum(-1)
    last = int(weights.nonzero()[-1])  # to which rounding may not add one that has no weight
    places = torch.searchsorted(ends, numbers.to(ends.device) * ends[-1], right=True).clamp(max=last)
    return places if ids is None else ids[places]


def log_probabilities(logits_RV: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities of raw logits, in at least float32."""
    return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)).log_softmax(-1)


def likeliest(log_probabilities_V: torch.Tensor, number: int, chosen: int) -> dict[int, float]:
    """Return the `number` likeliest ids and the chosen one, with their log-probabilities."""
    found = {chosen: float(log_probabilities_V[chosen])}
    if number:
        values, ids = log_probabilities_V.topk(min(number, len(log_probabilities_V)))
        found |= dict(zip(ids.tolist(), values.tolist()))
    return found
