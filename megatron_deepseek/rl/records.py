"""rollouts/step_N.jsonl of --save: the samples of the rollout that update N was the first to train on, one a line.

docs/grpo.md has the keys. A file is written whole or not at all. A run that goes on from an earlier iteration removes
the files of later ones, as it does the records in metrics.jsonl.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_deepseek.rl.collecting import Collected
from megatron_deepseek.rl.rollouts import Rollout
from megatron_deepseek.runtime.metrics import replace_content

FOLDER = "rollouts"  # of --save
_NAME = re.compile(r"step_(\d+)\.jsonl")


class Records:
    """The files of a run, on rank 0. A disk that is full ends no training: `tell` gets a line."""

    def __init__(self, save: Path, iteration: int, tell: Callable[[str], None]):
        self.folder, self.tell = save / FOLDER, tell
        for path in self.folder.glob("step_*.jsonl") if self.folder.is_dir() else ():
            match = _NAME.fullmatch(path.name)
            if match is not None and int(match[1]) > iteration:
                path.unlink(missing_ok=True)

    def write(self, rollout: Rollout, collected: Collected) -> None:
        """Write the samples of `rollout`, which is what was made of `collected`."""
        lines = [json.dumps(each, ensure_ascii=False, allow_nan=False) for each in sample_records(rollout, collected)]
        path = self.folder / f"step_{rollout.iteration + 1}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_content(path, "".join(line + "\n" for line in lines).encode())
        except OSError as error:
            self.tell(f"the samples of step {rollout.iteration + 1} are not kept: {error}")


def sample_records(rollout: Rollout, collected: Collected) -> Iterator[dict[str, Any]]:
    """Yield what is kept of each sample."""
    for place, (sample, prompt) in enumerate(zip(collected.samples, collected.prompts)):
        yield {"group": sample.group, "prompt": prompt.text, "completion": sample.text,
               "tokens": len(sample.tokens), "finish_reason": sample.finish_reason,
               "rewards": {name: values[place] for name, values in collected.verdict.values.items()},
               "reward": collected.verdict.total[place], "advantage": rollout.advantages[place],
               "rollout_log_probability": sum(sample.log_probabilities),
               "log_probability": _sum(rollout.old, place), "reference_log_probability": _sum(rollout.reference, place)}


def _sum(of_samples: tuple[torch.Tensor, ...] | None, place: int) -> float | None:
    return None if of_samples is None else of_samples[place].sum().item()
