"""Log-probabilities as the two APIs show them, and those of prompts as vLLM does.

They are of raw logits, before temperature and penalties. -infinity, which JSON has not, is shown as -9999.
"""

from collections.abc import Mapping, Sequence

from megatron_deepseek.serving.token_text import TokenText

LEAST = -9999.0

Tops = Mapping[int, float]


def shown(value: float) -> float:
    return max(value, LEAST)


def name_of(tokens: TokenText, token: int, as_ids: bool) -> str:
    """Return what a token is called: its text, or "token_id:17", which is always unique."""
    return f"token_id:{token}" if as_ids else tokens.text_of(token)


def completion_logprobs(tokens: TokenText, ids: Sequence[int], values: Sequence[float | None],
                        tops: Sequence[Tops | None], offsets: Sequence[int], number: int, as_ids: bool) -> dict:
    """Return the `logprobs` of a completion: four lists with an entry for each token.

    The first token of a prompt has null for both. Of tokens with equal texts the likeliest is listed.
    """
    listed = []
    for top in tops:
        found = None
        if top is not None:
            found = {}
            for token, value in sorted(_with_number(top, number).items(), key=lambda each: -each[1]):
                found.setdefault(name_of(tokens, token, as_ids), shown(value))
        listed.append(found)
    return {"text_offset": list(offsets), "token_logprobs": [None if each is None else shown(each) for each in values],
            "tokens": [name_of(tokens, each, as_ids) for each in ids], "top_logprobs": listed}


def _with_number(top: Tops, number: int) -> Tops:
    """Return the `number` likeliest with the chosen one, of a reading that may have more.

    The chosen one comes first in it.
    """
    if len(top) <= number + 1:
        return top
    chosen, *others = top.items()
    return dict([chosen, *sorted(others, key=lambda each: -each[1])[:number]])


def chat_logprobs(tokens: TokenText, ids: Sequence[int], values: Sequence[float], tops: Sequence[Tops], number: int,
                  as_ids: bool) -> list[dict]:
    """Return the `logprobs.content` of a chat's choice: an object for each token."""
    return [_entry(tokens, token, value, as_ids) | {"top_logprobs": [
        _entry(tokens, each, found, as_ids) for each, found in sorted(top.items(), key=lambda one: -one[1])[:number]]}
        for token, value, top in zip(ids, values, tops)]


def _entry(tokens: TokenText, token: int, value: float, as_ids: bool) -> dict:
    return {"token": name_of(tokens, token, as_ids), "logprob": shown(value), "bytes": list(tokens.bytes_of(token))}


def prompt_logprobs(tokens: TokenText, tops: Sequence[Tops | None], number: int) -> list[dict | None]:
    """Return vLLM's `prompt_logprobs`: for each token of the prompt the chosen one and the likeliest, by id.

    The rank of a chosen token that is none of the likeliest is not known, and null.
    """
    return [None if top is None else _ranked(tokens, top, number) for top in tops]


def _ranked(tokens: TokenText, top: Tops, number: int) -> dict:
    ordered = sorted(top.items(), key=lambda each: -each[1])
    return {str(token): {"logprob": shown(value), "rank": rank if rank <= number else None,
                         "decoded_token": tokens.text_of(token)}
            for rank, (token, value) in enumerate(ordered, start=1)}
