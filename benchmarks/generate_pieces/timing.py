"""What is measured of every engine, in the same way: this file imports the standard library alone."""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator

Answer = Callable[[list[list[int]], int], list[list[int]]]


def asked() -> dict:
    return json.loads(sys.argv[1])


def prompts(vocab_size: int, length: int) -> Iterator[list[int]]:
    """Yield random prompts, none twice: engines share the beginnings of equal ones."""
    generator = random.Random(0)
    while True:
        yield [generator.randrange(10, vocab_size) for _ in range(length)]


def measure(answer: Answer, given: dict, bytes_a_token: int | None, **more) -> None:
    """Print a line of JSON: for each batch medians of prefill and decoding, in seconds.

    `answer` returns so many greedy tokens after each prompt. With one token it is the prompts' forward, and its time
    the time to first token; what more tokens take beyond that is decoding.
    """
    source, rows = prompts(given["vocab_size"], given["prompt_tokens"]), {}
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[given["clock"]]
    for batch in given["batches"]:
        times: dict[int, list[float]] = {1: [], 1 + given["new_tokens"]: []}
        answer([next(source) for _ in range(batch)], 3)
        for _ in range(given["repeats"]):
            for number, taken in times.items():
                texts = [next(source) for _ in range(batch)]
                start = clock()
                made = answer(texts, number)
                taken.append(clock() - start)
                assert [len(each) for each in made] == [number] * batch, [len(each) for each in made]
        first, whole = map(statistics.median, times.values())
        rows[batch] = {"first": first, "decode": whole - first}
    compared = answer([list(range(20, 20 + given["prompt_tokens"]))], 8)[0]
    print(json.dumps({"rows": rows, "bytes_a_token": bytes_a_token, "tokens": compared, **more}))
