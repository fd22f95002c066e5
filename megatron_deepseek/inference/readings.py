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
        for span, row in zip(spans, rows):
            if span.sequence.parameters.prompt_logprobs is not None and not span.sequence.index:
                self._read_prompt(span, row, states_TH)

    def _read_prompt(self, span: Span, row: int, states_TH: torch.Tensor) -> None:
        """Read those of the tokens after each of a span's; what is known already is left, after a preemption."""
        prompt, reading = span.sequence.request.prompt, span.sequence.request.prompt_reading
        known = reading.log_probabilities
        places = range(max(span.begin, len(known) - 1), min(span.end, len(prompt) - 1))
        for begin in range(places.start, places.stop, self._rows_at_once):
            some = places[begin - places.start:][:self._rows_at_once]
            logits_RV = self.model.logits(states_TH, [row + place - span.begin for place in some])
            for place, found_V in zip(some, log_probabilities(logits_RV)):
                token = prompt[place + 1]
                known.append(float(found_V[token]))
                reading.tops.append(likeliest(found_V, span.sequence.parameters.prompt_logprobs, token))

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
