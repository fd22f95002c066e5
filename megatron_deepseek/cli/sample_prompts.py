"""The prompts of sample_answers.py: rows of any file that fine-tuning reads, or with a column that holds the question.

All rows are read and checked before a model is loaded. A row that cannot be asked is counted by its reason.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_deepseek.data.preprocess.inputs import find_inputs
from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.finetuning.conversation import BadRow, ToolCall, Turn
from megatron_deepseek.finetuning.messages import read_messages, text_of
from megatron_deepseek.finetuning.reading import check_packages, parse_line, parts_of, read_rows
from megatron_deepseek.inference.text import prompt_ids
from megatron_deepseek.rewards.answer import COLUMNS
from megatron_deepseek.serving.chat import ChatFormat, Question

QUESTIONS = ("messages", "conversations", "prompt", "question", "problem", "query", "instruction")
TOO_LONG = "longer than --seq-length allows"


@dataclass(frozen=True)
class Wording:
    """The columns of question and answer, None for the usual ones, and what is said beside the question.

    `raw`: the model continues the question as it is, without its template.
    """

    question: str | None = None
    answer: str | None = None
    system: str | None = None
    append: str = ""
    raw: bool = False


@dataclass(frozen=True, eq=False)
class SampledPrompt:
    """The prompt of row `number`, from 1 over all files. `row`: its columns, for rewards. `messages`: what the model is
    asked, as it stands in the training data. `text`: the prompt as the model sees it. `question` reads answers, None
    where there is no template.
    """

    number: int
    row: Mapping[str, Any]
    messages: tuple[dict, ...]
    ids: tuple[int, ...]
    text: str
    question: Question | None = None

    @property
    def asked(self) -> str:
        """Return the last question alone."""
        return self.messages[-1]["content"]


class PromptRows:
    """Reads prompts. `chat` gives the chat format; `most` is the largest number of a prompt's tokens."""

    def __init__(self, wording: Wording, tokenizer: Tokenizer, chat: Callable[[], ChatFormat], most: int):
        self.wording, self.tokenizer, self.most = wording, tokenizer, most
        self._chat = None if wording.raw else chat()
        self.unusable: Counter[str] = Counter()
        self.first_bad: dict[str, str] = {}  # by reason, where the first such row is and what is wrong with it

    def read(self, paths: Sequence[str]) -> list[SampledPrompt]:
        """Return the prompts of all files. Raise ValueError where a file cannot be read, or holds no prompt."""
        files = find_inputs(paths)
        check_packages(files, "--input")
        rows = ((files[part.file].path, line, content) for part in parts_of(files)
                for line, content in read_rows(part, files[part.file]))
        prompts = [prompt for number, place in enumerate(rows, start=1)
                   if (prompt := self._usable(number, *place)) is not None]
        if not prompts:
            why = next(iter(self.first_bad.values()), "there are no rows")
            raise ValueError(f"--input {' '.join(paths)} has no prompt that can be asked: {why}")
        return prompts

    def _usable(self, number: int, path: str, line: int, content: object) -> SampledPrompt | None:
        try:
            return self.prompt(number, parse_line(content))
        except BadRow as error:
            self.unusable[error.reason] += 1
            self.first_bad.setdefault(error.reason, f"{path} line {line}: {error}")
            return None

    def prompt(self, number: int, row: object) -> SampledPrompt:
        """Return the prompt of a row. Raise BadRow for one that cannot be asked."""
        if not isinstance(row, Mapping):
            raise BadRow("not an object", f"a row must be an object, this is a {type(row).__name__}")
        turns, right = self._turns(row)
        messages = tuple(_message(turn) for turn in turns)
        question, ids = self._ids(row, messages)
        if len(ids) > self.most:
            raise BadRow(TOO_LONG, f"the prompt has {len(ids)} tokens, and {self.most} is the most")
        row = row if right is None else {**row, "answer": right}
        return SampledPrompt(number, row, messages, ids, self.tokenizer.decode(list(ids)), question)

    def _turns(self, row: Mapping) -> tuple[list[Turn], str | None]:
        """Return the turns that the model is to answer, and the right answer, where another than its usual columns has
        it.
        """
        found, wording = self._column(row), self.wording
        turns = [Turn("user", found)] if isinstance(found, str) else list(read_messages(found))
        right = self._named_answer(row)
        if turns and turns[-1].role == "assistant":
            last = turns.pop()
            right = last.content if right is None and all(row.get(each) is None for each in COLUMNS) else right
        if not turns or turns[-1].role != "user":
            raise BadRow("no question at the end", "the last message before an answer must be the user's")
        turns[-1] = Turn("user", turns[-1].content + wording.append)
        system = row.get("system") or wording.system
        if system and turns[0].role != "system":
            turns.insert(0, Turn("system", text_of(system, "system")))
        if wording.raw and len(turns) > 1:
            raise BadRow("more than a question", "--raw continues one text; the row has messages before it")
        return turns, right

    def _column(self, row: Mapping) -> str | list:
        names = QUESTIONS if self.wording.question is None else (self.wording.question,)
        name = next((each for each in names if row.get(each) is not None), None)
        if name is None:
            raise BadRow("missing field", f"the row has none of the columns {', '.join(names)}")
        found = row[name]
        if row.get("history"):
            raise BadRow("history", "a row with the key history must hold it in messages")
        if not isinstance(found, (str, list)) or not found:
            raise BadRow("wrong type", f"the column {name} must hold a text or a list of messages")
        if name == "instruction" and self.wording.question is None and row.get("input"):
            return f"{found}\n{row['input']}"
        return found

    def _named_answer(self, row: Mapping) -> str | None:
        name = self.wording.answer
        if name is None:
            return None
        if row.get(name) is None:
            raise BadRow("missing field", f"the row has no column {name}")
        return str(row[name])

    def _ids(self, row: Mapping, messages: Sequence[dict]) -> tuple[Question | None, tuple[int, ...]]:
        if self._chat is None:
            return None, tuple(prompt_ids(self.tokenizer, messages[-1]["content"]))
        body = {"messages": list(messages), **({"tools": row["tools"]} if row.get("tools") else {})}
        try:
            question = self._chat.question(body)
        except ValueError as error:
            raise BadRow("cannot be asked", str(error)) from error
        return question, question.prompt


def _message(turn: Turn) -> dict[str, Any]:
    """Return a turn as OpenAI's message; earlier answers of the data are not trained on again."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.role == "assistant":
        message |= {"loss": False, **({"reasoning_content": turn.reasoning} if turn.reasoning else {})}
    if turn.calls:
        message["tool_calls"] = [_call(each) for each in turn.calls]
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
