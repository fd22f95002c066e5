"""The tools of a chat request, and what may be done with them: tools, tool_choice, parallel_tool_calls."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_deepseek.near_names import near_names
from megatron_deepseek.serving.chat.fields import a_list, an_object, fault, flag, kind, one_of, text

NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
AUTO, NONE, REQUIRED = "auto", "none", "required"


@dataclass(frozen=True)
class Tools:
    """What the model may call. `given` are the tools as the request has them, those that may be called only.

    `choice`: "auto", "none" or "required"; a named function is "required" with that one alone. `parallel`: whether an
    answer may have more than one call.
    """

    given: tuple[Mapping[str, Any], ...] = ()
    choice: str = NONE
    parallel: bool = True

    @property
    def shown(self) -> tuple[Mapping[str, Any], ...]:
        """Return those that the model is told of: none where it may call none."""
        return () if self.choice == NONE else self.given

    @property
    def functions(self) -> tuple[dict[str, Any], ...]:
        """Return their functions without the wrapping: name, and mostly description and parameters."""
        return tuple(dict(each["function"]) for each in self.shown)

    @property
    def forced(self) -> bool:
        """Return whether the answer must be calls."""
        return self.choice == REQUIRED


def read_tools(body: Mapping[str, Any]) -> Tools:
    """Return the tools of a request. Raise ValueError that names the field which is wrong."""
    for old in ("functions", "function_call"):
        if body.get(old) is not None:
            raise fault(old, "is no longer in use; give tools, and tool_choice")
    given = tuple(_tool(an_object(each, f"tools[{place}]"), f"tools[{place}]")
                  for place, each in enumerate(a_list(body.get("tools") or [], "tools")))
    names = [each["function"]["name"] for each in given]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise fault("tools", f"has the function {twice} twice")
    parallel = flag(body.get("parallel_tool_calls"), "parallel_tool_calls", True)
    choice = body.get("tool_choice")
    if choice is None:
        return Tools(given, AUTO if given else NONE, parallel)
    if isinstance(choice, Mapping):
        return Tools(_named(choice, given, names), REQUIRED, parallel=False)
    if not isinstance(choice, str):
        raise fault("tool_choice", f"must be a string or an object, not {kind(choice)}")
    one_of(choice, "tool_choice", (AUTO, NONE, REQUIRED))
    if choice == REQUIRED and not given:
        raise fault("tool_choice", "is required, and there are no tools")
    return Tools(given, choice if given else NONE, parallel)


def _tool(tool: Mapping[str, Any], path: str) -> dict[str, Any]:
    one_of(tool.get("type", "function"), f"{path}.type", ("function",))
    function = an_object(tool.get("function"), f"{path}.function")
    name = text(function.get("name"), f"{path}.function.name")
    if not NAME.fullmatch(name):
        raise fault(f"{path}.function.name", f"{name!r:.80} is not 1 to 64 letters, digits, '_', '-' and '.'")
    if function.get("description") is not None:
        text(function["description"], f"{path}.function.description")
    if function.get("parameters") is not None:
        an_object(function["parameters"], f"{path}.function.parameters")
    flag(function.get("strict"), f"{path}.function.strict", False)
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _named(choice: Mapping[str, Any], given: tuple[dict[str, Any], ...], names: list[str]
           ) -> tuple[dict[str, Any], ...]:
    """Return the one function that must be called."""
    one_of(choice.get("type", "function"), "tool_choice.type", ("function",))
    function = an_object(choice.get("function"), "tool_choice.function")
    name = text(function.get("name"), "tool_choice.function.name")
    if name not in names:
        likely = near_names(name, names)
        raise fault("tool_choice.function.name", f"{name!r:.80} is none of the tools"
                    + (f"; did you mean {' or '.join(likely)}?" if likely else ""))
    return (given[names.index(name)],)
