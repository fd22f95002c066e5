"""Many requests through the engines, a limited number at a time: the loop of commands that answer whole files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters

AHEAD = 4  # times --max-running: requests that wait at each replica, so that none is ever short of work


@dataclass(frozen=True)
class Asked:
    """A request with the `key` by which its answers are known. `follows`: it begins as the one before it does, and is
    answered by the same replica, which then computes their common beginning once.
    """

    key: Any
    prompt: tuple[int, ...]
    parameters: SamplingParameters
    follows: bool = False


def answer_all(replicas: Replicas, requests: Iterable[Asked], at_a_time: int) -> Iterator[tuple[Any, list[Output]]]:
    """Yield (key, answers) of each request when all of its answers are ready. `at_a_time` wait at each replica."""
    rest, keys, wanted, found = iter(requests), {}, {}, {}
    last = None
    while True:
        while len(keys) < at_a_time * replicas.layout.dp and (request := next(rest, None)) is not None:
            beside = last if request.follows and last in keys else None
            last = replicas.add(request.prompt, request.parameters, beside=beside)
            keys[last], wanted[last] = request.key, request.parameters.n
        if not keys:
            return
        for output in replicas.step():
            if output.finished:
                name = output.request_id
                of_request: dict[int, Output] = found.setdefault(name, {})
                of_request[output.index] = output
                if len(of_request) == wanted[name]:
                    yield keys.pop(name), [each for _, each in sorted(found.pop(name).items())]
