"""Requests of mixed lengths, the same for every server: this file imports the standard library alone."""

import random
from collections.abc import Iterator

PROMPT_TOKENS, ANSWER_TOKENS = (4, 8, 16, 32, 64, 128, 192), (1, 4, 8, 16, 32, 64, 96)
SMALLEST_ID, LARGEST_ID = 10, 200  # letters of the tokenizer that generate_pieces/model.py writes


def requests(number: int, seed: int = 0, longest: int = 1 << 30) -> Iterator[tuple[list[int], int]]:
    """Yield so many pairs of a random prompt, none twice, and a number of tokens for its answer."""
    generator = random.Random(seed)
    for _ in range(number):
        length, answer = generator.choice(PROMPT_TOKENS), generator.choice(ANSWER_TOKENS)
        yield [generator.randint(SMALLEST_ID, LARGEST_ID) for _ in range(min(length, longest))], min(answer, longest)


def body(model: str, prompt: list[int], tokens: int) -> dict:
    """Return a streamed completion of exactly so many greedy tokens, as both servers understand it."""
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}
