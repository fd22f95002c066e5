"""What requests want to know beside tokens: log-probabilities of prompt and answer, kept ids, and chosen experts.

Shapes: T tokens, H hidden, V vocabulary.
"""

import torch

from megatron_deepseek.inference.forward import InferenceModel
from megatron_deepseek.inference.kept_experts import KeptExperts
from megatron_deepseek.inference.request import Sequence
from megatron_deepseek.inference.sampling import Choice, likeliest, log_probabilities
from megatron_deepseek.inference.scheduler import Span

LOGITS_BYTES = 64 * 2**20  # of a prompt's logits that exist at once


class Readings:
    """Reads what was asked for from states and logits, into the sequences."""

    def __init__(self, model: InferenceModel):
        self.model = model
        block_size = model.settings.block_size
        self.experts = KeptExperts((model.num_blocks + 1) * block_size, block_size)
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

    def read_token(self, sequence: Sequence, logits_V: torch.Tensor, choice: Choice) -> None:
        """Read the log-probabilities of a token of the answer, and which ids it was drawn among."""
        number, token = sequence.parameters.logprobs, choice.token
        if sequence.parameters.drawn_logprobs:
            sequence.drawn_log_probabilities.append(choice.log_probability)
        if sequence.parameters.kept_ids:
            sequence.kept_ids.append(choice.kept_ids)
        if number is None:
            return
        found_V = log_probabilities(logits_V)
        sequence.log_probabilities.append(float(found_V[token]))
        sequence.top_log_probabilities.append(likeliest(found_V, number, token))

    def read_experts(self, sequence: Sequence) -> None:
        """Read the experts of a sequence's tokens, before it gives up its blocks."""
        if sequence.parameters.chosen_experts:
            sequence.experts = self.experts.of(sequence)


def _places(span: Span) -> range:
    """Return the places of a span after which tokens are read; what is known already is left, after a preemption."""
    sequence = span.sequence
    if sequence.parameters.prompt_logprobs is None or sequence.index:
        return range(0)
    return range(max(span.begin, sequence.request.prompt_reading.place),
                 min(span.end, len(sequence.request.prompt) - 1))
