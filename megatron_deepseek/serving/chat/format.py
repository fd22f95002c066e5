"""How one model is asked in a chat, and how its answers are read.

    chat = ChatFormat.of(tokenizer, folder)
    question = chat.question(body)                              # the JSON object of a request
    engine.add(question.prompt, question.sampling(parameters))
    parser = question.parser()                                  # one for each of the n answers
    deltas = parser.update(output)

A checkpoint's own template is used where there is one, else its family's (finetuning/templates.py), by which models are
fine-tuned here. What an answer looks like follows from the tokens that the tokenizer has and from the template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_deepseek.data.tokenizer import ASSISTANT, EOD, USER, Tokenizer
from megatron_deepseek.finetuning.encode import choose_template, control_ids
from megatron_deepseek.finetuning.templates import (
    CALL, CALLS, END_CALL, END_CALLS, END_THINK, SEPARATOR, TEMPLATES, THINK)
from megatron_deepseek.inference.grammar import Grammar
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.serving.chat import calls
from megatron_deepseek.serving.chat.checkpoint_template import CheckpointTemplate
from megatron_deepseek.serving.chat.family import FamilyTemplate
from megatron_deepseek.serving.chat.fields import fault
from megatron_deepseek.serving.chat.forced_calls import forced_calls, strict_calls
from megatron_deepseek.serving.chat.messages import read_messages
from megatron_deepseek.serving.chat.options import ChatOptions, read_options
from megatron_deepseek.serving.chat.parser import BARE, LINES, AnswerForm, AnswerParser
from megatron_deepseek.serving.chat.response_format import grammar_of
from megatron_deepseek.serving.chat.tools import NONE, Tools, read_tools

AUTO = "auto"
CHOICES = (AUTO, *TEMPLATES)
_READ = (THINK, END_THINK, CALLS, END_CALLS, CALL, END_CALL, SEPARATOR)  # what tells parts of an answer apart


class Renderer(Protocol):
    """Makes ids of messages. `asks_for_thoughts`: its prompts open the reasoning unless a request says otherwise."""

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Tools, options: ChatOptions) -> list[int]: ...


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """The format of one model. `name` says where its template is from; `thinking` is the usual answer to whether to
    reason first, None for the template's own.
    """

    name: str
    tokenizer: Tokenizer
    renderer: Renderer
    form: AnswerForm
    thinking: bool | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, folder: Path | str | None, template: str = AUTO, thinking: bool | None = None
           ) -> "ChatFormat":
        """Return the format of a model whose tokenizer lies in `folder`.

        `template`: "auto" for the one that is there, else what its tokens tell; the name of a family; or a file with a
        Jinja template. Raise ValueError, of one line, where there is none that fits.
        """
        folder = None if folder is None else Path(folder)
        folder = folder.parent if folder is not None and folder.is_file() else folder
        if template not in CHOICES and not Path(template).is_file():
            raise ValueError(f"--template {template} is neither one of {', '.join(CHOICES)} nor a file")
        found = None if template in TEMPLATES else CheckpointTemplate.find(
            tokenizer, folder, None if template == AUTO else Path(template))
        control = control_ids(tokenizer)
        if found is not None:
            return cls(found.name, tokenizer, found, _form_of_source(found.source, control), thinking)
        chosen = choose_template(template, tokenizer, None if folder is None else str(folder))
        renderer = FamilyTemplate(chosen, tokenizer, str(folder or "tokenizer"))
        form = AnswerForm(_known(control), BARE if chosen.thinks == "bare" else LINES,
                          _calls(control, fenced=chosen.fenced))
        return cls(chosen.name, tokenizer, renderer, form, thinking)

    def question(self, body: Mapping[str, Any]) -> "Question":
        """Return what a request asks. Raise ValueError, begun by a field's path, for what cannot be asked."""
        messages, tools = read_messages(body), read_tools(body)
        options = read_options(body, messages)
        if options.thinking is None:
            options = replace(options, thinking=self.thinking)
        if tools.shown and self.form.calls is None:
            raise fault("tools", f"the model of the template {self.name} has no tokens for calls of tools")
        prompt = tuple(self.renderer.render(messages, tools, options))
        inside = self._begins_inside(prompt)
        return Question(self, prompt, tools, options, inside, self._grammar(body, tools, inside))

    def _grammar(self, body: Mapping[str, Any], tools: Tools, inside: bool) -> Grammar | None:
        """Return what the answer must keep to, behind its reasoning where it begins inside of that."""
        begins_after = self.form.control.get(END_THINK) if inside else None
        leading = inside and self.form.thoughts == LINES
        found = grammar_of(body, begins_after, leading)
        if not tools.forced:
            return found or (strict_calls(tools, self.form) if tools.shown else None)
        if found is not None:
            raise fault(found.name, "cannot be with a tool_choice that asks for calls")
        return forced_calls(tools, self.form, begins_after, leading)

    def _begins_inside(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt has opened the reasoning, so that the answer begins inside of it."""
        control = control_ids(self.tokenizer)
        begin = control.get(THINK)
        others = {control[name] for name in (END_THINK, USER, ASSISTANT, EOD) if name in control}
        last = next((token for token in reversed(prompt) if token == begin or token in others), None)
        return last is not None and last == begin


@dataclass(frozen=True, eq=False)
class Question:
    """A request as the engine gets it: the ids of the prompt, and what its sampling must keep to.

    `begins_inside`: the prompt has opened the reasoning.
    """

    format: ChatFormat
    prompt: tuple[int, ...]
    tools: Tools
    options: ChatOptions
    begins_inside: bool
    grammar: Grammar | None

    def sampling(self, parameters: SamplingParameters) -> SamplingParameters:
        """Return `parameters` with the grammar, and with calls banned where tools are there but none may be called."""
        begin = self.format.form.control.get(CALLS)
        if self.tools.choice == NONE and self.tools.given and begin is not None:
            parameters = replace(parameters, logit_bias={**parameters.logit_bias, begin: float("-inf")})
        return parameters if self.grammar is None else replace(parameters, grammar=self.grammar)

    def parser(self) -> AnswerParser:
        """Return a reader of one answer."""
        form = self.format.form
        if not self.tools.shown:
            form = replace(form, calls=None)
        return AnswerParser(form, self.begins_inside, most_calls=None if self.tools.parallel else 1,
                            shows_reasoning=self.options.shows_reasoning)


def _form_of_source(source: str, control: Mapping[str, int]) -> AnswerForm:
    """Return how a model answers whose template is known by its source."""
    bare = "```" not in source and ("thinking" in source or f"{ASSISTANT}{END_THINK}" in source)
    return AnswerForm(_known(control), BARE if bare else LINES, _calls(control, fenced=not bare))


def _known(control: Mapping[str, int]) -> dict[str, int]:
    return {name: control[name] for name in _READ if name in control}


def _calls(control: Mapping[str, int], fenced: bool) -> str | None:
    """Return the form of calls of a tokenizer that has the tokens for them."""
    has_tokens = {CALLS, END_CALLS, CALL, END_CALL, SEPARATOR} <= control.keys()
    return (calls.FENCED if fenced else calls.BARE) if has_tokens else None
