"""The answers of an evaluation on disk, from which a killed one goes on.

    {"question": "0f3a...", "answer": [-3.25, false]}

A line is an answer, appended as soon as it is there. `question` is a digest of what was asked and of the checkpoint, so
one file may hold the answers of several checkpoints and tasks, and only what is asked again is looked up.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_deepseek.checkpoint.integrity import read_checksums
from megatron_deepseek.evaluation.questions import Answer, EvaluatedModel, Question, Score, digest_of
from megatron_deepseek.foreign_json import parse_json
from megatron_deepseek.runtime.appending import AppendedFile


class ResumedModel:
    """A model whose answers are kept in a file: what it holds already is not asked again.

    `checkpoint`: what tells the model's weights from others. `tell` gets a line of the file's troubles. A number that
    is not finite is not kept: JSON has none.
    """

    def __init__(self, model: EvaluatedModel, path: Path, checkpoint: str, tell: Callable[[str], None]):
        self.model, self.checkpoint = model, checkpoint
        self.tokenizer, self.max_length = model.tokenizer, model.max_length
        self._known = read_answers(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = AppendedFile(path, tell)

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Yield the number of each question with its answer, kept ones first."""
        names, seen = [], Counter()
        for question in questions:  # one that is asked twice has two answers
            name = digest_of(question, self.checkpoint)
            names.append(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
        missing = [number for number, name in enumerate(names) if name not in self._known]
        for number, name in enumerate(names):
            if name in self._known:
                yield number, self._known[name]
        for place, answer in self.model.answers([questions[number] for number in missing]):
            if not isinstance(answer, Score) or math.isfinite(answer.log_probability):
                self._keep(names[missing[place]], answer)
            yield missing[place], answer

    def _keep(self, name: str, answer: Answer) -> None:
        self._known[name] = answer
        self._file.write((json.dumps({"question": name, "answer": _plain(answer)}) + "\n").encode())

    def close(self) -> None:
        """Close the file. Raise OSError if the last answers could not be written."""
        self._file.close()


def read_answers(path: Path) -> dict[str, Answer]:
    """Return the answers in a file by their questions' digests, and cut off a last line that was not finished.

    Raise ValueError for a file that holds something else.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    found = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        record = parse_json(line, f"{path}, line {number}")
        if not isinstance(record, dict) or not isinstance(record.get("question"), str) or \
                not isinstance(record.get("answer"), list):
            raise ValueError(f"{path}, line {number} is no answer of an evaluation; name another file, or remove it")
        found[record["question"]] = _answer(record["answer"])
    if whole < len(content):
        os.truncate(path, whole)
    return found


def _plain(answer: Answer) -> list:
    return [answer.log_probability, answer.greedy] if isinstance(answer, Score) else answer


def _answer(plain: list) -> Answer:
    return Score(*plain) if len(plain) == 2 and isinstance(plain[1], bool) else plain


def checkpoint_digest(directory: Path, *options: object) -> str:
    """Return what tells the weights in a directory, used with these options, from others: 32 hexadecimal digits.

    The checksums of a checkpoint of a training say it; of other files their names, sizes and times of change do.
    """
    checksums = read_checksums(directory)
    files = sorted((name, each.bytes, each.digest) for name, each in checksums.items()) if checksums else sorted(
        (path.relative_to(directory).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in directory.rglob("*") if path.is_file())
    return hashlib.sha256(json.dumps([files, *map(str, options)]).encode()).hexdigest()[:32]
