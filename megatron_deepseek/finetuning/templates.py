"""The templates of DeepSeek's releases, rendered from fields: pieces of text and control tokens, each with its weight.

With S, Q, R, A the texts of system, question, reasoning and answer, EOS at the end of every answer:

  deepseek-v2     BOS S\\n\\nUser: Q\\n\\nAssistant: A EOS
  deepseek-v3     BOS S <|User|>Q <|Assistant|>A EOS     reasoning: the text <think>\\nR\\n</think>\\n\\n before A
  deepseek-r1     ... <|Assistant|> <think> \\nR\\n </think> \\n\\nA EOS
  deepseek-v3.1   ... <|Assistant|> <think> R </think> A EOS   or, without reasoning,   <|Assistant|> </think> A EOS

Loss is on what the model emits: a weight of 0 have the prompt, the assistant's token, the prefix that the release's
prompt forces (<think>\\n in R1, <think> or </think> in V3.1) and tools' outputs. The releases' own Jinja templates are
used in tests only: they drop reasoning, and R1's and V3's leave out tokens in some calls of tools.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

from megatron_deepseek.data.tokenizer import ASSISTANT, BOS, EOD, USER
from megatron_deepseek.finetuning.conversation import BadRow, Conversation, Turn

THINK, END_THINK = "<think>", "</think>"
CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
OUTPUTS, END_OUTPUTS = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT, END_OUTPUT = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
TOOL_TOKENS = (CALLS, END_CALLS, CALL, END_CALL, OUTPUTS, END_OUTPUTS, OUTPUT, END_OUTPUT, SEPARATOR)


class Piece(NamedTuple):
    """A text, or a control token where `control`; `weight` is the factor of its tokens in the loss."""

    text: str
    weight: float = 0.0
    control: bool = False


@dataclass(frozen=True)
class Rules:
    """What --history-reasoning and --train-think-prefix say."""

    history_reasoning: str = "as-release"
    train_think_prefix: bool = False


@dataclass(frozen=True)
class Template:
    """What tells the releases apart. `control` are the tokens that every conversation needs.

    `thinks` says how reasoning is written: "text" in the answer, or with the tokens "lines" (R1) or "bare" (V3.1).
    `fenced` puts calls' arguments into ```json; `between` stands between a tool's outputs; `shows_tools` says whether
    the schemas of tools belong to the system's text (elsewhere the release shows none).
    """

    name: str
    control: tuple[str, ...]
    thinks: str
    fenced: bool = True
    between: str = ""
    shows_tools: bool = False

    def render(self, conversation: Conversation, rules: Rules = Rules()) -> list[Piece]:
        """Return the pieces of a whole conversation. Raise BadRow where the template has no form for it."""
        if self.name == "deepseek-v2":
            return _v2(conversation, rules)
        return _Rendering(self, conversation, rules).all()

    def drops_history(self, rules: Rules) -> bool:
        """Return whether reasoning before the last question is left out."""
        return rules.history_reasoning == "drop" or rules.history_reasoning == "as-release" and self.thinks != "text"

    def left_out(self, conversation: Conversation, rules: Rules) -> dict[str, int]:
        """Return what of a conversation is not shown, with its number, so that nothing is lost in silence."""
        last = conversation.last_user if self.drops_history(rules) else 0
        thoughts = sum(turn.reasoning is not None for turn in conversation.turns[:max(last, 0)])
        hidden = 0 if self.shows_tools else len(conversation.tools)
        return {why: count for why, count in (
            (f"reasonings before the last question (--history-reasoning {rules.history_reasoning})", thoughts),
            (f"schemas of tools, for which {self.name} has no form", hidden)) if count}

    def prompt(self, conversation: Conversation, thinking: bool, rules: Rules = Rules()) -> list[Piece]:
        """Return the pieces of a conversation, and of what asks for an answer: nothing does behind a tool's output."""
        pieces = self.render(conversation, rules)
        roles = [turn.role for turn in conversation.turns if turn.role != "system"]
        if roles and roles[-1] == "tool":
            return pieces
        if self.name == "deepseek-v2":
            return [*pieces, Piece("Assistant:")]
        forced = {"lines": [Piece(THINK, 0, True), Piece("\n")] if thinking else [],
                  "bare": [Piece(THINK if thinking else END_THINK, 0, True)], "text": []}[self.thinks]
        return [*pieces, Piece(ASSISTANT, 0, True), *forced]


_CHAT = (BOS, EOD, USER, ASSISTANT)
TEMPLATES = {each.name: each for each in (
    Template("deepseek-v2", (BOS, EOD), "text"),
    Template("deepseek-v3", _CHAT, "text", between="\n"),
    Template("deepseek-r1", (*_CHAT, THINK, END_THINK), "lines"),
    Template("deepseek-v3.1", (*_CHAT, THINK, END_THINK), "bare", fenced=False, shows_tools=True),
)}


def _with_thoughts(turn: Turn, reasoning: str | None) -> str:
    return turn.content if reasoning is None else f"{THINK}\n{reasoning}\n{END_THINK}\n\n{turn.content}"


def _v2(conversation: Conversation, rules: Rules) -> list[Piece]:
    pieces, last_user = [Piece(BOS, 0, True)], conversation.last_user
    drops = TEMPLATES["deepseek-v2"].drops_history(rules)
    for index, turn in enumerate(conversation.turns):
        if turn.role == "tool" or turn.calls:
            raise BadRow("no form for tools", "--template deepseek-v2 has no form for tools; remove the row")
        if turn.role == "assistant":
            reasoning = None if drops and index < last_user else turn.reasoning
            pieces += [Piece("Assistant:"), Piece(" " + _with_thoughts(turn, reasoning), turn.weight),
                       Piece(EOD, turn.weight, True)]
        else:
            pieces.append(Piece(f"{'User: ' if turn.role == 'user' else ''}{turn.content}\n\n"))
    return pieces


class _Rendering:
    """The pieces of one conversation in the templates from V3 on."""

    def __init__(self, template: Template, conversation: Conversation, rules: Rules):
        self.template, self.conversation, self.rules = template, conversation, rules
        self.last_user = conversation.last_user
        self.before = None  # the role of the turn before
        self.pieces: list[Piece] = []

    def all(self) -> list[Piece]:
        turns = self.conversation.turns
        system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
        self._add(BOS, 0, True)
        self._add(system)
        if self.template.shows_tools and self.conversation.tools:
            self.pieces += _schemas(self.conversation.tools)
        for index, turn in enumerate(turns):
            if turn.role != "system":
                {"user": self._user, "assistant": self._assistant, "tool": self._tool}[turn.role](index, turn)
                self.before = turn.role
        self._end_outputs()
        return self.pieces

    def _add(self, text: str, weight: float = 0.0, control: bool = False):
        if text:
            self.pieces.append(Piece(text, weight, control))

    def _user(self, index: int, turn: Turn):
        self._end_outputs()
        self._add(USER, 0, True)
        self._add(turn.content)

    def _assistant(self, index: int, turn: Turn):
        self._end_outputs()
        asked = self.before != "tool"
        if asked:
            self._add(ASSISTANT, 0, True)
        {"text": self._text, "lines": self._lines, "bare": self._bare}[self.template.thinks](index, turn, asked)
        if turn.calls:
            self._calls(turn)
        self._add(EOD, turn.weight, True)

    def _reasoning(self, index: int, turn: Turn) -> str | None:
        """Return the reasoning of a turn that is shown."""
        is_history = index < self.last_user
        return None if is_history and self.template.drops_history(self.rules) else turn.reasoning

    def _text(self, index: int, turn: Turn, asked: bool):
        reasoning = self._reasoning(index, turn)
        self._add(_with_thoughts(turn, reasoning), turn.weight)

    def _lines(self, index: int, turn: Turn, asked: bool):
        reasoning = self._reasoning(index, turn)
        if reasoning is not None:
            self._forced(THINK, turn, asked, control=True)
            self._forced("\n", turn, asked)
            self._add(f"{reasoning}\n", turn.weight)
            self._add(END_THINK, turn.weight, True)
        cut = (turn.reasoning is not None and reasoning is None and not turn.calls
               and self.rules.history_reasoning == "as-release")
        self._add(("\n\n" if reasoning is not None or cut else "") + turn.content, turn.weight)

    def _bare(self, index: int, turn: Turn, asked: bool):
        reasoning = self._reasoning(index, turn)
        if reasoning is not None:
            self._forced(THINK, turn, asked, control=True)
            self._add(reasoning, turn.weight)
            self._add(END_THINK, turn.weight, True)
        elif asked:
            self._add(END_THINK, 0, True)
        self._add(turn.content, turn.weight)

    def _forced(self, text: str, turn: Turn, asked: bool, control: bool = False):
        """Add a part of the prefix that a prompt forces. Behind a tool's output none is: the model emits it."""
        self._add(text, turn.weight if self.rules.train_think_prefix or not asked else 0.0, control)

    def _calls(self, turn: Turn):
        self._add(CALLS, turn.weight, True)
        for number, call in enumerate(turn.calls):
            if number and self.template.fenced:
                self._add("\n", turn.weight)
            self._add(CALL, turn.weight, True)
            self._add("function" if self.template.fenced else call.name, turn.weight)
            self._add(SEPARATOR, turn.weight, True)
            self._add(f"{call.name}\n```json\n{call.arguments}\n```" if self.template.fenced else call.arguments,
                      turn.weight)
            self._add(END_CALL, turn.weight, True)
        self._add(END_CALLS, turn.weight, True)

    def _tool(self, index: int, turn: Turn):
        if self.template.fenced and self.before != "tool":
            self._add(OUTPUTS, 0, True)
        elif self.before == "tool":
            self._add(self.template.between)
        self._add(OUTPUT, 0, True)
        self._add(turn.content)
        self._add(END_OUTPUT, 0, True)

    def _end_outputs(self):
        if self.template.fenced and self.before == "tool":
            self._add(END_OUTPUTS, 0, True)


def _schemas(tools: tuple[dict, ...]) -> list[Piece]:
    """Return V3.1's description of the tools, from its model card; the tokens of the format are real ones."""
    listed = "".join(f"### {tool['name']}\nDescription: {tool.get('description') or ''}\n\nParameters: "
                     f"{json.dumps(tool.get('parameters') or {}, ensure_ascii=False)}\n\n" for tool in tools)
    return [Piece(f"\n\n## Tools\nYou have access to the following tools:\n\n{listed}"
                  "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"),
            Piece(CALLS, 0, True), Piece(CALL, 0, True), Piece("tool_call_name"), Piece(SEPARATOR, 0, True),
            Piece("tool_call_arguments"), Piece(END_CALL, 0, True), Piece("{additional_tool_calls}"),
            Piece(END_CALLS, 0, True),
            Piece("\n\nWhere:\n- `tool_call_name` must be an exact match to one of the available tools\n"
                  "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
                  "- For multiple tool calls, chain them directly without separators or spaces")]
