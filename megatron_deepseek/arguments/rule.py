"""One validation rule of the command line, and how its message names the sizes of a layout."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_deepseek.arguments.request import Request

TP = "--tensor-model-parallel-size {r.tp}"
PP = "--pipeline-model-parallel-size {r.pp}"
CP = "--context-parallel-size {r.cp}"
EP = "--expert-model-parallel-size {r.ep}"
ETP = "--expert-tensor-parallel-size {r.etp}"


@dataclass(frozen=True)
class Rule:
    """A combination of arguments that is refused.

    `name`: a phrase that says the problem; --explain-layout and docs/compatibility.md show it. `when`: true of a
    Request with that problem. `message`: what the user reads, a format string over the Request `r`. `excludes`: pairs
    of features (features.py) that the rule refuses whatever the sizes.
    """

    name: str
    when: Callable[[Request], bool]
    message: str
    excludes: tuple[tuple[str, str], ...] = ()
