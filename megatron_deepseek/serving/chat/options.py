"""What a chat request asks of the template beside its messages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_deepseek.serving.chat.fields import an_object, fault, flag, one_of

# Fields of a request that concern its template and its tools, beside the messages.
CHAT_FIELDS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "add_generation_prompt",
               "continue_final_message", "chat_template_kwargs", "reasoning_effort", "thinking", "include_reasoning",
               "chat_template")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class ChatOptions:
    """`asks`: the template opens an answer. `continues`: the last message is the assistant's, and goes on.

    `thinking`: whether to reason first; None leaves it to the model's usual way. `shows_reasoning`: whether reasoning
    is returned. `arguments`: further variables of a Jinja template.
    """

    asks: bool = True
    continues: bool = False
    thinking: bool | None = None
    shows_reasoning: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)


def read_options(body: Mapping[str, Any], messages: list[dict[str, Any]]) -> ChatOptions:
    """Return the options of a request. Raise ValueError that names the field which is wrong.

    A last message with "prefix": true is continued, as DeepSeek's API has it.
    """
    if body.get("chat_template") is not None:
        raise fault("chat_template", "cannot come with a request: --template of the server names another")
    continues = flag(body.get("continue_final_message"), "continue_final_message", None)
    asks = flag(body.get("add_generation_prompt"), "add_generation_prompt", None)
    last = messages[-1]
    if continues is None:
        continues = last.get("prefix", False) and not asks
    if continues and asks:
        raise fault("continue_final_message", "cannot be with add_generation_prompt: the last message goes on, or a "
                                              "new one begins")
    if continues and last["role"] != "assistant":
        raise fault("continue_final_message", f"needs a last message of the assistant, and its role is {last['role']}")
    if continues and last.get("tool_calls"):
        raise fault("continue_final_message", "cannot be where the last message has tool_calls")
    arguments = an_object(body.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    effort = body.get("reasoning_effort")
    if effort is not None:
        arguments = {"reasoning_effort": one_of(effort, "reasoning_effort", EFFORTS), **arguments}
    return ChatOptions(asks=not continues if asks is None else asks, continues=continues,
                       thinking=_thinking(body, arguments),
                       shows_reasoning=flag(body.get("include_reasoning"), "include_reasoning", True),
                       arguments=arguments)


def _thinking(body: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool | None:
    """Return whether to reason first: the template's argument, DeepSeek's `thinking`, or OpenAI's effort."""
    for name in ("thinking", "enable_thinking"):
        if arguments.get(name) is not None:
            return flag(arguments[name], f"chat_template_kwargs.{name}", None)
    given = body.get("thinking")
    if isinstance(given, Mapping):
        return one_of(given.get("type"), "thinking.type", ("enabled", "disabled", "auto")) == "enabled"
    if given is not None:
        return flag(given, "thinking", None)
    effort = arguments.get("reasoning_effort")
    return None if effort is None else effort != "none"
