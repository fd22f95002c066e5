"""How a model is asked in chats, for tasks that are given as messages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Render = Callable[[Sequence[Mapping[str, str]], bool], str]


@dataclass(frozen=True)
class Chats:
    """A model's chat template. `render` writes messages as a text, after which an answer follows if the second argument
    says so, else the rest of the last message; it is None where the model has no template. `name` is for the results.
    """

    name: str = ""
    render: Render | None = None
