"""The file of generate.py's answers: one JSON object a line, in the order in which they are ready, whole or not at all.

    {"line": 3, "digest": "...", "prompt": "...",
     "outputs": [{"text": "...", "tokens": [...], "finish_reason": "stop"}]}

A run that was killed leaves at most its last line unfinished. The next one cuts that off, and answers what is missing.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_deepseek.cli.generate_prompts import PromptLine
from megatron_deepseek.foreign_json import parse_json
from megatron_deepseek.inference.output import Output
from megatron_deepseek.runtime.appending import AppendedFile


def record(line: PromptLine, outputs: Sequence[Output]) -> dict:
    """Return the answers to a line, in their order."""
    return {"line": line.number, "digest": line.digest, **line.shown, "outputs": [_shown(each) for each in outputs]}


def _shown(output: Output) -> dict:
    more = {name: getattr(output, name) for name in (
        "log_probabilities", "top_log_probabilities", "prompt_log_probabilities", "prompt_top_log_probabilities")}
    return {"text": output.text, "tokens": output.tokens, "finish_reason": output.finish_reason,
            **{name: value for name, value in more.items() if value is not None}}


def cut_and_read(path: Path, lines: Sequence[PromptLine]) -> set[int]:
    """Cut off an unfinished last line, and return the numbers of the prompts that are answered in a file.

    Raise ValueError if it holds answers to other prompts, of another model or other options, or something else.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    digests, done = {line.number: line.digest for line in lines}, set()
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        found = parse_json(line, f"--output {path}, line {number}")
        if not isinstance(found, dict) or "line" not in found or digests.get(found["line"]) != found.get("digest"):
            raise ValueError(f"--output {path}, line {number} is no answer to these prompts, with these options, by "
                             "this model; name another file, or remove it")
        done.add(found["line"])
    if whole < len(content):
        os.truncate(path, whole)
    return done


class AnswersFile:
    """The file, to which each answer is written at once."""

    def __init__(self, path: Path, tell):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = AppendedFile(path, tell)

    def write(self, line: PromptLine, outputs: Sequence[Output]) -> None:
        self._file.write((json.dumps(record(line, outputs), ensure_ascii=False) + "\n").encode())

    def close(self) -> None:
        """Close the file. Raise OSError if the last answers could not be written."""
        self._file.close()
