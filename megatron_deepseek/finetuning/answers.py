"""--generate-every: answers to held-out prompts by the model that is being trained, in whatever layout it is.

Every new token is one evaluation of whole rows (training/reading_rows.py), so this is meant for a few prompts. The
likeliest token is taken each time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_deepseek.data.tokenizer import Tokenizer, build_tokenizer
from megatron_deepseek.finetuning.prompts import Prompt
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.reading_rows import continue_rows
from megatron_deepseek.training.trainer import Trainer

FOLDER = "answers"  # of --save
_END_OF_THOUGHT = "</think>"


@dataclass(frozen=True)
class Answer:
    """What the model wrote to a prompt; `ended` by the end of sentence, not by the number of tokens."""

    prompt: Prompt
    text: str
    ended: bool

    @property
    def matches(self) -> bool:
        """Return whether the answer behind the thoughts is the one in the file, but for blanks around it."""
        return self.ended and self.text.rpartition(_END_OF_THOUGHT)[2].strip() == self.prompt.answer.strip()

    def record(self) -> dict:
        return {"prompt": self.prompt.text, "text": self.text, "expected": self.prompt.answer, "ended": self.ended,
                "matches": self.matches}


class Answers:
    """Answers the same prompts whenever it is called, and reports how many are as in the file."""

    def __init__(self, settings: Settings, name: str, prompts: Sequence[Prompt]):
        self.settings, self.name = settings, name
        self.prompts = [each for each in prompts if len(each.ids) < settings.data.seq_length]
        self.tokenizer = build_tokenizer(settings.data.tokenizer_type, settings.data.tokenizer_model)

    def __call__(self, trainer: Trainer, report: Report, iteration: int) -> None:
        answers = answer(trainer, self.settings, self.prompts, self.tokenizer)
        matches = sum(each.matches for each in answers)
        report.held_out(iteration, self.name, {"exact_match": matches / (len(answers) or 1), "answers": len(answers)})
        if self.settings.run.save is not None and dist.get_rank() == 0:
            try:
                write(answers, self.settings.run.save / FOLDER / f"iter_{iteration:07d}.jsonl")
            except OSError as error:
                report.message(f"the answers of iteration {iteration} are not kept: {error}")


def write(answers: Sequence[Answer], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each.record(), ensure_ascii=False) + "\n" for each in answers),
                    encoding="utf-8")


def answer(trainer: Trainer, settings: Settings, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[Answer]:
    """Return the answers on all ranks, which all call this: data ranks share the prompts."""
    most = [settings.fine_tuning.generate_tokens] * len(prompts)
    found = continue_rows(trainer, [each.ids for each in prompts], most,
                          lambda number, tokens: tokens[-1] == tokenizer.eod)
    return [_answer(prompt, ids, tokenizer) for prompt, ids in zip(prompts, found)]


def _answer(prompt: Prompt, ids: list[int], tokenizer: Tokenizer) -> Answer:
    ended = bool(ids) and ids[-1] == tokenizer.eod
    return Answer(prompt, tokenizer.decode(ids[:-1] if ended else ids), ended)
