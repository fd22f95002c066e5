"""From rows of logits to the next tokens.

Every answer has random numbers of its own, of which each token takes one. So a draw depends on the request's seed, its
tokens so far and their logits, and on nothing else in the batch; rows that are drawn from alike are drawn from at once.

Shapes: V vocabulary, R rows, N candidates of a row.
"""

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_deepseek.inference.request import Sequence
from megatron_deepseek.inference.sampling_parameters import SamplingParameters

RUN = 64  # weights that are added up before one is looked for among them
LIKELIEST = 256  # how many of the likeliest tokens are sorted at first, to find the smallest set of `top_p`


@dataclass(frozen=True, eq=False)
class Choice:
    """A token, and if the request asks for them its log-probability and its kept ids, as Output has them."""

    token: int
    log_probability: float | None = None
    kept_ids: torch.Tensor | None = None


def next_token(logits_V: torch.Tensor, sequence: Sequence) -> Choice:
    """Return the token that the sequence's parameters and numbers choose."""
    return choose(adjusted(logits_V, sequence).unsqueeze(0), [sequence], [sequence.num_answered])[0]


def choose(logits_RV: torch.Tensor, sequences: Sequences[Sequence], places: Sequences[int]) -> list[Choice]:
    """Return a choice from each row of adjusted logits. `sequences` are the rows', whose parameters are alike in
    `way_of`; `places`: of which tokens of their answers.
    """
    parameters = sequences[0].parameters
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    if parameters.greedy:
        scaled_RV, weights_RN, ids_RN = logits_RV, None, None
        tokens_R = logits_RV.argmax(-1)
    else:
        scaled_RV = logits_RV if parameters.temperature == 1 else logits_RV / parameters.temperature
        weights_RN, ids_RN = candidates(scaled_RV, parameters)
        numbers_R = torch.tensor([each.numbers[place] for each, place in zip(sequences, places)], dtype=torch.float64)
        tokens_R = draw(weights_RN, ids_RN, numbers_R.unsqueeze(1)).squeeze(1)
    tokens, nothing = tokens_R.tolist(), [None] * len(sequences)
    found = log_probabilities_of(tokens_R, scaled_RV, weights_RN, parameters).tolist() if parameters.drawn_logprobs \
        else nothing
    kept = kept_of(weights_RN, ids_RN, logits_RV.shape[1]) if parameters.kept_ids and parameters.cuts else nothing
    return [*map(Choice, tokens, found, kept)]


def way_of(parameters: SamplingParameters) -> tuple:
    """Return all that `choose` reads of parameters: rows of requests with the same are drawn from at once."""
    return (parameters.greedy, parameters.temperature, parameters.top_k, parameters.top_p, parameters.min_p,
            parameters.drawn_logprobs, parameters.kept_ids)


def is_adjusted(sequence: Sequence) -> bool:
    """Return whether the next token is chosen from other logits than the model's own."""
    parameters = sequence.parameters
    return bool(parameters.penalised or parameters.logit_bias or sequence.constraint is not None
                or sequence.num_answered < parameters.min_tokens)


def log_probabilities_of(tokens_R: torch.Tensor, scaled_RV: torch.Tensor, weights_RN: torch.Tensor | None,
                         parameters: SamplingParameters) -> torch.Tensor:
    """Return the log-probability of each token among the candidates of its row, [R] float64."""
    if weights_RN is not None and not parameters.cuts:  # then they are the probabilities of all ids
        return weights_RN.gather(-1, tokens_R.unsqueeze(1)).squeeze(1).double().log()
    found_R = log_probabilities(scaled_RV).gather(-1, tokens_R.unsqueeze(1)).squeeze(1).double()
    return found_R - weights_RN.double().sum(-1).log() if parameters.cuts else found_R


def kept_of(weights_RN: torch.Tensor, ids_RN: torch.Tensor | None, size: int) -> list[torch.Tensor | None]:
    """Return the ids that each row has weights for, int32 on the host; None if these are all `size`."""
    rows, places = weights_RN.nonzero(as_tuple=True)
    ids = places if ids_RN is None else ids_RN[rows, places]
    counts, ids = rows.bincount(minlength=len(weights_RN)).tolist(), ids.to("cpu", torch.int32)
    with torch.inference_mode(False):  # they may be an index in a training step; each in memory of its own
        return [None if len(each) == size else each.clone() for each in ids.split(counts)]


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


def candidates(scaled_RV: torch.Tensor, parameters: SamplingParameters) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weights [R, N] of the tokens that top_k, top_p and min_p leave, and their ids; None for all in order.

    Weights are probabilities: what is left does not add up to one. Other tokens have a weight of 0. top_p counts within
    what top_k leaves.
    """
    size = scaled_RV.shape[-1]
    top_k = min(parameters.top_k or size, size)
    if top_k == size and parameters.top_p == 1:
        weights_RN, ids_RN = scaled_RV.softmax(-1), None
    else:
        weights_RN, ids_RN = _nucleus(scaled_RV, top_k, parameters.top_p)
    if parameters.min_p:
        weights_RN = weights_RN.where(weights_RN >= parameters.min_p * weights_RN.amax(-1, keepdim=True), 0)
    return weights_RN, ids_RN


def _nucleus(scaled_RV: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest set of likeliest tokens whose share of the first `top_k` reaches `top_p`.

    Sorting a few of them is mostly enough: the whole vocabulary is sorted only where their share is too small.
    """
    size = scaled_RV.shape[-1]
    number = min(top_k, LIKELIEST if top_k == size else top_k)
    probabilities_RV = scaled_RV.softmax(-1)
    weights_RN, ids_RN = probabilities_RV.topk(number)
    total_R1 = (weights_RN if top_k < size else probabilities_RV).sum(-1, keepdim=True)
    short_R = (weights_RN.sum(-1, keepdim=True) < top_p * total_R1).squeeze(-1)
    if number < top_k and short_R.any():
        weights_RN, ids_RN = (F.pad(x, (0, size - number)) for x in (weights_RN, ids_RN))
        weights_RN[short_R], ids_RN[short_R] = probabilities_RV[short_R].sort(descending=True)
    before_RN = weights_RN.cumsum(-1) - weights_RN
    return weights_RN.where(before_RN < top_p * total_R1, 0), ids_RN


def draw(weights_RN: torch.Tensor, ids_RN: torch.Tensor | None, numbers_RM: torch.Tensor) -> torch.Tensor:
    """Return, for each of a row's M numbers, uniform in [0, 1), the id whose part of the sum of weights has it, [R, M].

    Parts lie in the order of the weights. Without `ids_RN` the place is the id. Sums are of runs of `RUN` weights at
    first, and then of the weights of one run: each weight is read once. They are in float64.
    """
    size = weights_RN.shape[-1]
    padded_RN = F.pad(weights_RN, (0, -size % RUN)) if size % RUN else weights_RN
    runs_RnL = padded_RN.unflatten(-1, (-1, RUN))
    ends_Rn = runs_RnL.sum(-1, dtype=torch.float64).cumsum(-1)
    below_R1 = _below(ends_Rn[..., -1:])
    wanted_RM = (numbers_RM.to(ends_Rn.device) * ends_Rn[..., -1:]).minimum(below_R1)
    run_RM = torch.searchsorted(ends_Rn, wanted_RM, right=True)
    inner_RML = runs_RnL.take_along_dim(run_RM.unsqueeze(-1), -2).double().cumsum(-1)
    rest_RM = wanted_RM - F.pad(ends_Rn, (1, 0)).take_along_dim(run_RM, -1)
    rest_RM1 = rest_RM.unsqueeze(-1).minimum(_below(inner_RML[..., -1:]))
    places_RM = run_RM * RUN + torch.searchsorted(inner_RML, rest_RM1, right=True).squeeze(-1)
    return places_RM if ids_RN is None else ids_RN.take_along_dim(places_RM, -1)


def _below(total: torch.Tensor) -> torch.Tensor:
    """Return the greatest number below each total: at the total itself, by rounding, there is nothing more."""
    return total.nextafter(torch.zeros_like(total))


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
