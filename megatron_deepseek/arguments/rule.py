"""One entry of the table of refusals, and how its messages name the sizes of a layout."""

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
    """`name` tells the entries apart in tests; `when` is true of a Request that `message` refuses.

    `excludes`: pairs of features (features.py) that it refuses whatever the sizes.
    """

    name: str
    when: Callable[[Request], bool]
    message: str
    excludes: tuple[tuple[str, str], ...] = ()
