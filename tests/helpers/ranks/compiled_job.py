"""What a rank does where layers are compiled: the training of job.py, and how many graphs there are after each step."""

from dataclasses import dataclass, replace

from cases import Case
from job import FLOAT64, Record, spec_of, train

from megatron_deepseek.torch_private import compiled_so_far
from megatron_deepseek.training.trainer import Trainer


@dataclass
class Compiled:
    """`graphs` so far, and the tokens of all experts, after each step. An evaluation came before the last step."""

    record: Record
    graphs: list[int]
    counts: list[dict[str, list[int]]]


def run_compiled(case: Case, backend: str, num_steps: int) -> Compiled:
    seen = Compiled(Record(), [], [])
    plain = Trainer.train_step

    def counted(trainer: Trainer, *args, **more):
        result = plain(trainer, *args, **more)
        seen.graphs.append(compiled_so_far()[0])
        seen.counts.append({name: counts.tolist() for name, counts in result.expert_counts.items()})
        return result

    Trainer.train_step = counted
    spec = spec_of(case, FLOAT64)
    sizes = case.first_batch_size, case.global_batch_size
    seen.record = train(replace(spec, build=replace(spec.build, compiler=backend)), case.layout, sizes, num_steps,
                        case.packed, case.padded, case.objective)
    return seen
