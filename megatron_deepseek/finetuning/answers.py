"""--generate-every: answers to held-out prompts by the model that is being trained, in whatever layout it is.

Every new token is one evaluation of whole rows, so this costs as many forwards as the longest answer has tokens: meant
for a few prompts. The likeliest token is taken each time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import sample_indices
from megatron_deepseek.data.tokenizer import Tokenizer, build_tokenizer
from megatron_deepseek.finetuning.prompts import Prompt
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.settings import Settings
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
    layout, micro_batch_size = settings.layout, settings.batch.micro_batch_size
    stride = micro_batch_size * layout.dp
    own = sample_indices(0, -(-max(len(prompts), 1) // stride) * stride, micro_batch_size, trainer.meshes.rank("dp"),
                         layout.dp)
    rows = [list(prompts[number].ids) if number < len(prompts) else [tokenizer.eod] for number in own]
    begun, ended = list(map(len, rows)), [number >= len(prompts) for number in own]
    for _ in range(settings.fine_tuning.generate_tokens):
        ended = [done or len(row) >= settings.data.seq_length for done, row in zip(ended, rows)]
        if _everywhere(all(ended), trainer):
            break
        batch = _batch(rows, settings.data.seq_length, tokenizer.eod)
        following_BS = trainer.likeliest(batch.to(trainer.meshes.device)).cpu()
        for place, row in enumerate(rows):
            if not ended[place]:
                row.append(int(following_BS[place, len(row) - 1]))
                ended[place] = row[-1] == tokenizer.eod
    found = {number: row[first:] for number, row, first in zip(own, rows, begun) if number < len(prompts)}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    ids = {number: row for part in everyone for number, row in part.items()}
    return [_answer(prompt, ids[number], tokenizer) for number, prompt in enumerate(prompts)]


def _answer(prompt: Prompt, ids: list[int], tokenizer: Tokenizer) -> Answer:
    ended = bool(ids) and ids[-1] == tokenizer.eod
    return Answer(prompt, tokenizer.decode(ids[:-1] if ended else ids), ended)


def _batch(rows: Sequence[Sequence[int]], seq_length: int, pad: int) -> Batch:
    """Return the rows with padding behind them, which a causal model's tokens don't see."""
    tokens_BS = torch.full((len(rows), seq_length), pad)
    for tokens_S, row in zip(tokens_BS, rows):
        tokens_S[:len(row)] = torch.tensor(row)
    lengths_B = torch.tensor([len(row) for row in rows])
    return Batch(tokens_BS=tokens_BS, labels_BS=tokens_BS, weights_BS=torch.zeros(tokens_BS.shape),
                 real_BS=torch.arange(seq_length) < lengths_B[:, None])


def _everywhere(done: bool, trainer: Trainer) -> bool:
    """Return whether all ranks are done: they make forwards together."""
    told = torch.tensor(int(done), device=trainer.meshes.device)
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return bool(told.item())
