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

    def problem(self, request: Request) -> str | None:
        """Return the message where the rule applies, or the words of a reader that it asks; None where it does not."""
        try:
            return self.message.format(r=request) if self.when(request) else None
        except ValueError as error:
            return str(error)


@dataclass(frozen=True)
class Topic:
    """Rules that are checked together.

    `chained`: each rule relies on those above it, so that only the first that applies is reported; otherwise all are.
    `after`: names of topics on which this one relies: with a problem there it is not looked at.
    """

    name: str
    rules: tuple[Rule, ...]
    chained: bool = False
    after: tuple[str, ...] = ()

    def problems(self, request: Request) -> list[str]:
        """Return the messages of the rules that apply."""
        found = []
        for rule in self.rules:
            message = rule.problem(request)
            if message is not None:
                found.append(message)
                if self.chained:
                    break
        return found
