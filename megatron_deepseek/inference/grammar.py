"""What an answer must be, as a grammar of the library llguidance; without torch, for requests are checked at once.

llguidance (github.com/guidance-ai/llguidance) is optional: the extra [serve] has it. It needs no other package, where
xgrammar, which other servers use, asks for triton and transformers. Its JSON schemas, regular expressions and Lark
grammars are documented there; what it cannot keep to it refuses.
"""

import importlib.util
from dataclasses import dataclass

from megatron_deepseek.packages import how_to_install


@dataclass(frozen=True)
class Grammar:
    """A grammar that an answer keeps to. `definition` is llguidance's own form, JSON with a list of grammars.

    `begins_after`: the token behind which it holds; None for the whole answer. `must_begin`: the answer cannot end
    before that token, as with the one that ends reasoning; else it may do without, as with the one that begins tool
    calls. `name` is what errors call it: the field of the request that it was made from.
    """

    definition: str
    begins_after: int | None = None
    name: str = "grammar"
    must_begin: bool = True


def need_library(name: str) -> None:
    """Raise ValueError, begun by `name`, where llguidance is not installed."""
    if importlib.util.find_spec("llguidance") is None:
        raise ValueError(f"{name}: needs the package llguidance, which is not installed: "
                         f"{how_to_install('llguidance')}")
