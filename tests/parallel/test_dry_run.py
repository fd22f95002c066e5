"""A dry run of a rank against that rank in a job over gloo: every byte that the tensors of a step take, by kind and in
every act, and every collective. All of it is equal.
"""

from dataclasses import replace

import pytest
import torch
from cases import WIDE_CASES, covering_cases
from command_lines import settings_of as settings_of_case
from dry_run_job import dry_step, real_step
from small_models import V3_SMALL

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.dry_run import rank as dry_rank
from megatron_deepseek.dry_run.labels import ACTIVATIONS, OPTIMIZER, TEMPORARIES, WEIGHTS
from megatron_deepseek.settings import Settings

MODEL = replace(V3_SMALL, num_attention_heads=4, num_hidden_layers=4)
TUNED = "--loss-average sample --load base"  # what finetune_deepseek.py alone knows


def settings_of(arguments: str, ranks: int) -> Settings:
    tuned = arguments.startswith(TUNED)
    text = (f"--model tiny --{'dataset' if tuned else 'data-path'} x --train-iters 1 --micro-batch-size 2 "
            f"--seq-length 16 --mtp-num-layers 0 {arguments}")
    settings = parse(text.split(), ranks, None, build_finetuning_parser if tuned else build_parser)
    return replace(settings, model=replace(MODEL, num_nextn_predict_layers=settings.model.num_nextn_predict_layers))


LAYOUTS = {
    "one rank": (1, "--bf16 --global-batch-size 4 --recompute-granularity full --mtp-num-layers 1"),
    "pipeline, experts": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --bf16 "
                             "--mtp-num-layers 1 --global-batch-size 16 --pipeline-schedule ZBVZeroBubble"),
    "tensors, two micro-batches": (2, "--tensor-model-parallel-size 2 --sequence-parallel --global-batch-size 4 "
                                      "--recompute-granularity full"),
}
SLOW = {
    "one rank, FP8": (1, "--bf16 --fp8-format e4m3 --global-batch-size 4 --recompute-granularity selective"),
    "FP8, tensors": (4, "--bf16 --fp8-format e4m3 --fp8-param-gather --tensor-model-parallel-size 2 "
                        "--sequence-parallel --expert-model-parallel-size 2 --global-batch-size 8"),
    "context ring": (2, "--context-parallel-size 2 --bf16 --mtp-num-layers 1"),
    "context gathered": (2, "--context-parallel-size 2 --cp-comm-type allgather --bf16 "
                            "--recompute-granularity selective"),
    "all-gather, ZeRO-3": (2, "--expert-model-parallel-size 2 --bf16 --moe-token-dispatcher-type allgather "
                              "--data-parallel-sharding-strategy optim_grads_params --global-batch-size 8"),
    "two levels": (4, "--expert-model-parallel-size 4 --moe-token-dispatcher-type grouped --moe-ranks-per-node 2"),
    "sliced experts": (2, "--expert-tensor-parallel-size 2 --bf16"),
    "pairs that overlap": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --global-batch-size 16 "
                              "--pipeline-schedule DualPipeV --overlap-moe-expert-parallel-comm --bf16"),
    "optimizer on the host": (2, "--optimizer-cpu-offload --bf16 --expert-model-parallel-size 2 --exp-avg-dtype bf16 "
                                 "--global-batch-size 8 --cpu-offloading-num-layers 2"),
    "fine-tuning": (2, f"{TUNED} --bf16 --expert-model-parallel-size 2 --mtp-num-layers 1 --global-batch-size 8"),
    "LoRA": (4, f"{TUNED} --bf16 --lora-rank 2 --lora-dropout 0.1 --tensor-model-parallel-size 2 "
                "--pipeline-model-parallel-size 2 --global-batch-size 4"),
    "QLoRA": (2, f"{TUNED} --bf16 --lora-rank 2 --quantization-bit 4 --expert-model-parallel-size 2 "
                 "--data-parallel-sharding-strategy optim_grads_params --global-batch-size 8"),
    "FP8 base": (1, f"{TUNED} --bf16 --lora-rank 2 --quantization-bit 8 --recompute-granularity full"),
}
CASES = (*covering_cases(), *WIDE_CASES)
OF_CASES = range(0, len(CASES), 7)
COUNTS = [12] * MODEL.n_routed_experts  # of 2 x 16 tokens, 3 choices each


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_dry_run_takes_and_sends_what_the_rank_does(ranks, name):
    number, arguments = (LAYOUTS | SLOW)[name]
    compare(ranks, settings_of(arguments, number), range(number))


@pytest.mark.slow
@pytest.mark.parametrize("number", OF_CASES)
def test_cases_of_the_covering_array(ranks, number):
    """The first and the last rank, which pipelines treat otherwise than those between."""
    world_size = CASES[number].layout.world_size
    compare(ranks, settings_of_case(CASES[number], "--bf16"), sorted({0, world_size - 1}))


def compare(ranks, settings: Settings, chosen) -> None:
    found = ranks.run(settings.layout.world_size, real_step, settings)
    for rank in chosen:
        real, dry = found[rank], dry_step(settings, rank, found[rank].reads)
        assert [each.act for each in dry.levels] == [each.act for each in real.levels]
        assert dry.collectives == real.collectives
        assert [(each.act, each.bytes, each.categories) for each in dry.levels] == [
            (each.act, each.bytes, each.categories) for each in real.levels]


def planted(stage, kind: str, kept: list) -> None:
    """Have a stage take a byte more of one kind; of what is gone at once more than all that is there beside it."""
    if kind == WEIGHTS:
        stage.register_buffer("more", torch.zeros(1, dtype=torch.uint8))
    elif kind == ACTIVATIONS:
        stage.register_forward_pre_hook(lambda *_: kept.append(torch.zeros(1, dtype=torch.uint8)))
    else:
        stage.register_forward_pre_hook(lambda *_: torch.zeros(1 << 24, dtype=torch.uint8).numel() and None)


@pytest.mark.parametrize("kind", (ACTIVATIONS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (
    WEIGHTS, TEMPORARIES, OPTIMIZER))))
def test_a_byte_more_is_seen(monkeypatch, kind):
    settings = settings_of("--bf16 --global-batch-size 4", 1)
    reads = {index: [(COUNTS, [COUNTS])] * 2 for index in range(1, MODEL.num_hidden_layers)}
    plain, kept = dry_step(settings, 0, reads).levels, []
    make, label = dry_rank.with_dispatchers, dry_rank.label_states

    def plant(stages, *others):
        planted(stages[0], kind, kept)
        return make(stages, *others)

    def with_moment(log, trainer, batch):
        trainer.optimizer.state[trainer.parameters[0].parameter]["more"] = torch.zeros(1, dtype=torch.uint8)
        label(log, trainer, batch)

    if kind == OPTIMIZER:
        monkeypatch.setattr(dry_rank, "label_states", with_moment)
    else:
        monkeypatch.setattr(dry_rank, "with_dispatchers", plant)
    more = [level.categories[kind] - before.categories[kind]
            for level, before in zip(dry_step(settings, 0, reads).levels, plain, strict=True)]
    forwards = [level.act.startswith("F") for level in plain]
    if kind in (WEIGHTS, OPTIMIZER):
        assert more == [1] * len(plain)
    elif kind == ACTIVATIONS:
        assert [number for number, forward in zip(more, forwards) if forward] == [1, 2] and more[-1] == 2
    else:
        assert [number > 1 << 23 for number in more] == forwards
