"""Ready reward functions that only look at texts. Options of --reward NAME(option=value) are their keywords.

All take prompts, completions and rows of the same number, and return a reward for each, or None where a row does not
say what is right.
"""

import re
from collections.abc import Sequence

from megatron_deepseek.rewards import words
from megatron_deepseek.rewards.answer import END_THINK, THINK, answer_of, opened, right_answer

Texts = Sequence[str]
Rows = Sequence[dict]
Rewards = list[float | None]

QUESTION = "question"  # the language of the prompt
_UNITS = ("characters", "words", "tokens")
TOKENS_COLUMN = "completion_tokens"


def format_reward(prompts: Texts, completions: Texts, rows: Rows) -> Rewards:
    """Return 1 for an answer of R1's form, else 0: <think>, thoughts, </think>, each tag once, and an answer behind it.

    What the prompt opened is put before the completion (DeepSeek-R1, section 2.2.2: format rewards).
    """
    return [float(_has_form(opened(prompt) + completion)) for prompt, completion in zip(prompts, completions)]


def _has_form(text: str) -> bool:
    if text.count(THINK) != 1 or text.count(END_THINK) != 1 or not text.startswith(THINK):
        return False
    thoughts, _, answer = text[len(THINK):].partition(END_THINK)
    return bool(thoughts.strip() and answer.strip())


def exact_reward(prompts: Texts, completions: Texts, rows: Rows, *, answer: str = "") -> Rewards:
    """Return 1 where the answer behind the reasoning is the row's, but for blanks around it, else 0.

    `answer`: the row's column; without it `answer`, `solution`, or the last message if it is the assistant's.
    """
    right = [right_answer(row, answer) for row in rows]
    return [None if expected is None else float(answer_of(prompt, completion) == expected)
            for prompt, completion, expected in zip(prompts, completions, right)]


def length_reward(prompts: Texts, completions: Texts, rows: Rows, *, longest: int, soft: int = 0,
                  unit: str = "tokens") -> Rewards:
    """Return 0 for a completion up to `longest` - `soft`, -1 above `longest`, and what is on the line between.

    This is DAPO's soft overlong punishment (arXiv 2503.14476, equation 13). `unit`: tokens, of which the row's column
    completion_tokens tells the number, words or characters. Raise ValueError for a unit that is none of these.
    """
    if unit not in _UNITS or not 0 <= soft <= longest:
        raise ValueError(f"unit {unit} must be one of {', '.join(_UNITS)}, and soft {soft} from 0 to longest {longest}")
    return [_overlong(_length(completion, row, unit), longest, soft) for completion, row in zip(completions, rows)]


def _length(completion: str, row: dict, unit: str) -> int | None:
    if unit == "tokens":
        return row.get(TOKENS_COLUMN)
    return len(completion) if unit == "characters" else len(words.words(completion))


def _overlong(length: int | None, longest: int, soft: int) -> float | None:
    if length is None:
        return None
    if length <= longest - soft:
        return 0.0
    return -1.0 if length > longest else (longest - soft - length) / soft


def language_reward(prompts: Texts, completions: Texts, rows: Rows, *, language: str = QUESTION) -> Rewards:
    """Return which share of a completion's letters is of the language's script, from 0 to 1.

    `language`: a code such as en or zh; `question` takes the one whose script most letters of the prompt are of. Code
    and formulas do not count. Languages of one script are not told apart (R1's reward counts words: section 2.3.2).

    Raise ValueError for an unknown language.
    """
    if language != QUESTION and language not in words.SCRIPTS:
        raise ValueError(f"language {language} is neither {QUESTION} nor one of {', '.join(words.SCRIPTS)}")
    asked = [words.language_of(prompt) if language == QUESTION else language for prompt in prompts]
    return [None if one is None else words.language_share(completion, one)
            for one, completion in zip(asked, completions)]


def repetition_reward(prompts: Texts, completions: Texts, rows: Rows, *, size: int = 4) -> Rewards:
    """Return minus the share of a completion's runs of `size` words that were in it before: 0 to -1."""
    return [-words.repetition(completion, size) for completion in completions]


def regex_reward(prompts: Texts, completions: Texts, rows: Rows, *, pattern: str = "", column: str = "regex"
                 ) -> Rewards:
    """Return 1 where a regular expression is found in the answer behind the reasoning, else 0.

    It is `pattern`, or without it that in the row's `column`. Raise ValueError for a pattern that is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    patterns = [pattern or row.get(column) for row in rows]
    return [None if one is None else float(re.search(one, answer_of(prompt, completion)) is not None)
            for prompt, completion, one in zip(prompts, completions, patterns)]
