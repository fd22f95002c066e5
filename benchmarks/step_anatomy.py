#!/usr/bin/env python3
"""The operators and bytes of each part of a training step, forward and backward, beside the least bytes that it needs.

    python benchmarks/step_anatomy.py [--bf16] [--micro-batches 2] [--operators PART]

A step of a small DeepSeek-V3 with an MTP module runs on the CPU, on one rank, and a dispatch mode counts: nothing is
timed, so that the load of the machine does not matter. The output is the table of docs/benchmarks.md. The kernels are
those of the CPU; csrc/ fuses norms, rotary embedding, permutations and the loss on a GPU. `--operators` lists what one
part is made of.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from anatomy_pieces import least, parts  # noqa: E402
from anatomy_pieces.counting import BACKWARD, FORWARD, REST, Count, StepCounter  # noqa: E402

from megatron_deepseek.data.batch import Batch  # noqa: E402
from megatron_deepseek.model.architecture.config import ModelConfig  # noqa: E402
from megatron_deepseek.model.build import BuildOptions, Precision  # noqa: E402
from megatron_deepseek.parallel.layout import Layout  # noqa: E402
from megatron_deepseek.parallel.layout_string import Stage  # noqa: E402
from megatron_deepseek.parallel.mesh import build_meshes  # noqa: E402
from megatron_deepseek.parallel.start import join_job  # noqa: E402
from megatron_deepseek.settings import LossSettings, OptimizerSettings  # noqa: E402
from megatron_deepseek.training.trainer import Trainer, TrainingSpec  # noqa: E402

MODEL = ModelConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
    q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    moe_intermediate_size=256, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, first_k_dense_replace=1,
    n_group=4, topk_group=2, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
    routed_scaling_factor=2.5, max_position_embeddings=4096, num_nextn_predict_layers=1)
LENGTH = 512


def count_step(model: ModelConfig, bf16: bool, micro_batches: int, length: int = LENGTH) -> tuple[StepCounter, int]:
    """Return what the second step of a training counted, of micro-batches of one sequence, and the parameters."""
    stage = Stage(True, tuple(range(model.num_hidden_layers)), tuple(range(model.num_nextn_predict_layers)), True)
    build = BuildOptions(precision=Precision(torch.float32, torch.bfloat16 if bf16 else None),
                         loss=LossSettings(balance_type="seq_aux_loss", moe_aux_loss_coeff=1e-4))
    spec = TrainingSpec(model, (stage,), "1F1B", length, 1, build, OptimizerSettings())
    trainer = Trainer(spec, build_meshes(Layout(), torch.device("cpu")))
    tokens = torch.randint(model.vocab_size, (micro_batches, length + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens_BS=tokens[:, :-1].contiguous(), labels_BS=tokens[:, 1:].contiguous(),
                  weights_BS=torch.ones(micro_batches, length))
    trainer.train_step(batch, 1e-3)
    counter = StepCounter(accumulated=parts.REDUCED)
    with parts.parts_of_steps(counter, trainer.stages[0]), counter:
        trainer.train_step(batch, 1e-3)
    return counter, sum(each.parameter.numel() for each in trainer.parameters)


def least_bytes(model: ModelConfig, bf16: bool, micro_batches: int, parameters: int, length: int = LENGTH
                ) -> dict[tuple[str, str], float]:
    """Return the least bytes of each part of a step."""
    e = 2 if bf16 else 4
    shape = least.Shape(model, length, e)
    found = {part: least.times(micro_batches, rule(shape)) for part, rule in least.OF_MICRO_BATCH.items()}
    found |= {part: rule(parameters, e, micro_batches) for part, rule in least.OF_STEP.items()}
    return {(part, way): size for part, both in found.items() for way, size in zip((FORWARD, BACKWARD), both)}


def rows(counter: StepCounter, needed: dict[tuple[str, str], float]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| part | operators | MB | least | times | operators, backward | MB | least | times |"
    yield "|---|---|---|---|---|---|---|---|---|"
    total = {FORWARD: (Count(), 0.0), BACKWARD: (Count(), 0.0)}
    for part in (*least.OF_MICRO_BATCH, *least.OF_STEP, REST):
        cells = []
        for way in (FORWARD, BACKWARD):
            counted, size = counter.counts.get((part, way), Count()), needed.get((part, way), 0.0)
            total[way] = total[way][0] + counted, total[way][1] + size
            cells += _cells(counted, size)
        yield f"| {part} | {' | '.join(cells)} |"
    yield f"| together | {' | '.join(cell for way in total for cell in _cells(*total[way]))} |"


def _cells(counted: Count, size: float) -> list[str]:
    ratio = f"{counted.bytes / size:.1f}" if size else ""
    if not counted.operators and not size:
        return [""] * 4
    return [f"{counted.operators:,}", f"{counted.bytes / 1e6:.1f}", f"{size / 1e6:.1f}" if size else "", ratio]


def operators_of(counter: StepCounter, part: str) -> Iterator[str]:
    """Yield what a part is made of, the most bytes first."""
    found = [(counted, way, name) for (of, way, name), counted in counter.by_operator.items() if of == part]
    for counted, way, name in sorted(found, key=lambda each: -each[0].bytes):
        yield f"{way:9s} {name:50s} {counted.operators:6d} {counted.bytes / 1e6:10.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bf16", action="store_true", help="layers in bfloat16; else float32")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--operators", metavar="PART", help="list the operators of a part instead of the table")
    args = parser.parse_args()
    join_job(torch.device("cpu"), 10)
    counter, parameters = count_step(MODEL, args.bf16, args.micro_batches)
    lines = operators_of(counter, args.operators) if args.operators else rows(
        counter, least_bytes(MODEL, args.bf16, args.micro_batches, parameters))
    print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
