"""Small files of preference data, and the samples that they become."""

import json
from pathlib import Path

import torch

from megatron_deepseek.finetuning.prepare import prepare
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.finetuning.settings import LABELLED, PAIRS, SCORED, DataSettings

KINDS = {"kto": LABELLED, "reward": SCORED}


def pairs(number: int) -> list[dict]:
    """Pairs of very different lengths, every third with a margin."""
    return [{"prompt": "q" * (1 + n % 3), "chosen": "good"[:1 + n % 4] + "x" * (n % 5),
             "rejected": "no" + "y" * (n % 4)} | ({"margin": 0.5} if n % 3 == 0 else {}) for n in range(number)]


def labelled(number: int) -> list[dict]:
    """Answers of very different lengths, of which two in three are good."""
    return [{"prompt": f"{n}?", "completion": "a" * (1 + n % 4), "label": n % 3 > 0} for n in range(number)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path, objective: str, **options) -> Rows:
    """The rows of one epoch, by the order of the plan."""
    given = {"tokenizer_type": "ByteTokenizer", "template": "deepseek-v3", "seq_length": 32, "num_workers": 1,
             "kind": KINDS.get(objective, PAIRS)} | options
    return Rows(prepare(DataSettings((str(path),), **given), lambda line: None), epochs=1, shuffle=False)


def random_sums(rows: Rows, seed: int) -> tuple:
    """A reference's log-probability of each sample of each dataset, of about a random model's size."""
    generator = torch.Generator().manual_seed(seed)
    return tuple((-8 * torch.rand(len(lengths), dtype=torch.float64, generator=generator)).numpy()
                 for lengths in rows.plan.lengths)
