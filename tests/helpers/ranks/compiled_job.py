"""What a rank does where layers are compiled: the training of a job, and how many graphs there are after each step."""

from collections.abc import Callable
from dataclasses import dataclass

from job import Record

from megatron_deepseek.model import compiled
from megatron_deepseek.torch_private import compiled_so_far
from megatron_deepseek.training.trainer import Trainer


@dataclass
class Compiled:
    """`graphs` so far, and the tokens of all experts, after each step. An evaluation came before the last step."""

    record: Record
    graphs: list[int]
    counts: list[dict[str, list[int]]]


def run_counted(run: Callable[..., Record], *arguments) -> Compiled:
    """Return what `run` of `arguments` does, one of the jobs that train, with all graphs that a GPU would have."""
    seen = Compiled(Record(), [], [])
    plain = Trainer.train_step

    def counted(trainer: Trainer, *args, **more):
        result = plain(trainer, *args, **more)
        seen.graphs.append(compiled_so_far()[0])
        seen.counts.append({name: counts.tolist() for name, counts in result.expert_counts.items()})
        return result

    Trainer.train_step = counted  # of this process, which ends with the job, and so for what follows
    compiled.SLOWER_ON_CPU = frozenset()
    seen.record = run(*arguments)
    return seen
