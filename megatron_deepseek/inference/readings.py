"""What requests want to know beside tokens: log-probabilities of prompt and answer, and chosen experts.

Shapes: T tokens, H hidden, V vocabulary, K experts of a token.
"""

import torch

from megatron_deepseek.inference.forward import Chosen, InferenceModel
from megatron_deepseek.inference.request import Sequence
from megatron_deepseek.inference.sampling import likeliest, log_probabilities
from megatron_deepseek.inference.scheduler import Span

LOGITS_BYTES = 64 * 2**20  # of a prompt's logits that exist at once


class Readings:
    """Reads what was asked for from states and logits, into the sequences."""

    def __init__(self, model: InferenceModel):
        self.model = model
        self._rows_at_once = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))

    def read_prompts(self, spans: list[Span], rows: list[int], states_TH: torch.Tensor) -> None:
        """Read the log-probabilities of prompts that want them, as far as they were computed."""
        wanted = [(span.sequence, place, row + place - span.begin)
                  for span, row in zip(spans, rows) for place in _places(span)]
        for begin in range(0, len(wanted), self._rows_at_once):
            self._read_places(wanted[begin:begin + self._rows_at_once], states_TH)

    def _read_places(self, wanted: list[tuple[Sequence, int, int]], states_TH: torch.Tensor) -> None:
        """Read the tokens after some (sequence, place, row), which are in the order of places."""
        found_RV = log_probabilities(self.model.logits(states_TH, [row for *_, row in wanted]))
        for (sequence, place, _), found_V in zip(wanted, found_RV):
            reading, token = sequence.request.prompt_reading, sequence.request.prompt[place + 1]
            found = likeliest(found_V, sequence.parameters.prompt_logprobs, token)
            reading.log_probabilities.append(found[token])
            reading.tops.append(found)

    def read_token(self, sequence: Sequence, logits_V: torch.Tensor, token: int) -> None:
        """Read the log-probability of a token of the answer."""
        number = sequence.parameters.logprobs
        if number is None:
            return
        found_V = log_probabilities(logits_V)
        sequence.log_probabilities.append(float(found_V[token]))
        sequence.top_log_probabilities.append(likeliest(found_V, number, token))

    def keep_experts(self, span: Span, row: int, chosen: Chosen | None) -> None:
        """Keep the experts of a span's tokens that stay, in place of what was known of them."""
        sequence = span.sequence
        if chosen is None or not sequence.parameters.chosen_experts:
            return
        stays = span.kept - span.begin
        if span.begin == 0:
            sequence.experts.clear()
        sequence.experts.append({name: experts_TK[row:row + stays].clone() for name, experts_TK in chosen.items()})


def _places(span: Span) -> range:
    """Return the places of a span after which tokens are read; what is known already is left, after a preemption."""
    sequence = span.sequence
    if sequence.parameters.prompt_logprobs is None or sequence.index:
        return range(0)
    return range(max(span.begin, sequence.request.prompt_reading.place),
                 min(span.end, len(sequence.request.prompt) - 1))
