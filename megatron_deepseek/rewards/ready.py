"""The reward functions that are ready to use, by the names that --reward knows, with their options. No torch.

A new one is a function like those of texts.py and a row of READY; its options are its keywords.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from megatron_deepseek.rewards import mathematics, programs, texts

Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Ready:
    """A ready reward. `package`: what must be installed for it, with its module. `sandboxed`: it runs programs that a
    model wrote in processes of its own, with their own time limits, and so needs no worker.

    Called without completions, the function raises ValueError for options that cannot work on this machine.
    """

    function: Reward
    package: tuple[str, str] | None = None
    sandboxed: bool = False


READY = {
    "math": Ready(mathematics.math_reward, ("math-verify", "math_verify")),
    "format": Ready(texts.format_reward),
    "exact": Ready(texts.exact_reward),
    "length": Ready(texts.length_reward),
    "language": Ready(texts.language_reward),
    "repetition": Ready(texts.repetition_reward),
    "regex": Ready(texts.regex_reward),
    "code": Ready(programs.code_reward, sandboxed=True),
}


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Return the options of a ready reward by name."""
    parameters = inspect.signature(READY[name].function).parameters.values()
    return {each.name: each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
