"""What the engine gives for a request."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Output:
    """One of the n answers to a request, as far as it has come.

    `tokens` are all of the answer, with the one that ended it; `text` is what they say, without a stop string and
    without the token that ended it, and None if the engine has no tokenizer. While the answer runs, `text` leaves out
    what may still become part of a stop string or of a character. `text_ends`: the length of the text after each of
    `tokens`, with what `text` still leaves out. `finish_reason`: "stop", "length" or "abort", and None while it runs;
    an answer whose grammar grew beyond the library's limits is aborted too. `stop_reason`, as in vLLM: the string of
    `stop` or the id of `stop_token_ids` that ended the answer; None where it ended otherwise.

    Log-probabilities are of raw logits, None unless they were asked for. `log_probabilities` has one for each of
    `tokens`, `top_log_probabilities` the likeliest by id, with the chosen one. The prompt's have None for its first
    token. `queue_seconds`: for which the answer waited to be begun, None if it never was.

    `drawn_log_probabilities`, beside those of raw logits: of each of `tokens` under the distribution that it was drawn
    from, after penalties, biases, bans and temperature, among the ids that top_k, top_p and min_p left. Without a draw,
    at temperature 0, it is that of the softmax at temperature 1 (as vLLM's processed_logprobs). `kept_ids`: for each of
    `tokens` the ids that these three left, int32 on the host, None where they cut off none. `chosen_experts`, of a
    finished answer: layer name -> int16 [tokens, K], of every token that went through the model, on the host: the
    prompt's and the answer's but the last one.
    """

    request_id: str
    index: int
    prompt: tuple[int, ...]
    tokens: list[int]
    text: str | None
    text_ends: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    log_probabilities: list[float] | None = None
    top_log_probabilities: list[dict[int, float]] | None = None
    prompt_log_probabilities: list[float | None] | None = None
    prompt_top_log_probabilities: list[dict[int, float] | None] | None = None
    drawn_log_probabilities: list[float] | None = None
    kept_ids: list[torch.Tensor | None] | None = None
    chosen_experts: Mapping[str, torch.Tensor] | None = None
    queue_seconds: float | None = field(default=None, compare=False)

    @property
    def finished(self) -> bool:
        """Return whether no more tokens will come."""
        return self.finish_reason is not None

    @property
    def settled(self) -> int:
        """Return how many of `tokens` say no more than `text` does: all of them at the end, or without a text."""
        if self.finished or self.text is None:
            return len(self.tokens)
        return bisect_right(self.text_ends, len(self.text))
