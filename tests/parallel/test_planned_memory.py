"""What the layers of a rank keep in layouts of several ranks: calculated, and seen by saved-tensor hooks on each rank.

Experts are chosen by position, so that every rank gets as many rows; all else is as in training.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from saved_bytes import saved_bytes
from small_models import V2_SMALL, V3_SMALL, random_batch, training_batch, whole_stage

from megatron_deepseek.arguments import parse
from megatron_deepseek.model.build import BuildOptions, Precision, build_stages
from megatron_deepseek.model.step import StepContext
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.stage_bytes import stage_bytes
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.division import divide
from megatron_deepseek.training.next_token import NextToken

LENGTH, ROWS = 16, 2
MODELS = {"v2": replace(V2_SMALL, num_attention_heads=4), "v3": replace(V3_SMALL, num_attention_heads=4)}


def settings_of(arguments: str, ranks: int, model: str) -> Settings:
    text = (f"--model tiny --data-path x --train-iters 1 --micro-batch-size {ROWS} --seq-length {LENGTH} "
            f"--moe-router-force-load-balancing --mtp-num-layers 0 {arguments}")
    return replace(parse(text.split(), ranks), model=MODELS[model])


def kept(settings: Settings) -> tuple[int, int]:
    """Return what hooks see on this rank, on the device and the host."""
    run, config = settings.run, settings.model
    meshes = build_meshes(settings.layout, torch.device("cpu"))
    precision = Precision(torch.float32, torch.bfloat16 if run.bf16 else None, fp8=run.fp8_format is not None)
    options = BuildOptions(precision=precision, loss=settings.loss, recompute=settings.recompute,
                           communication=settings.communication, offload=settings.offload)
    (model,) = build_stages(config, [whole_stage(config)], meshes, LENGTH, options)
    model.train()
    objective = NextToken()
    batch = training_batch(*random_batch(config, ROWS, LENGTH))
    division = divide(batch, objective, model.model.layers["0"].self_attn.cp, ROWS, True)
    (micro_batch,) = division.micro_batches.items
    counts = {name: float(count) for name, count in objective.counts(division.rows).items()}
    step = StepContext(ROWS, partial(objective.contribution, counts=counts))
    model(division.tokens_BS, micro_batch, step)  # FSDP gathers weights, and keeps them
    own = [getattr(each, "_local_tensor", each) for each in (*model.parameters(), *model.buffers())]
    inputs = [division.tokens_BS, micro_batch.rows.labels_BMS, micro_batch.rows.weights_BMS, model.rope_2SD]
    with pytest.MonkeyPatch.context() as monkeypatch:
        saw = saved_bytes(lambda: model(division.tokens_BS, micro_batch, step), own + inputs, monkeypatch)
    return saw.device, saw.host


LAYOUTS = {
    "tp": ("--tensor-model-parallel-size 2", 2),
    "tp sp": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "cp ring": ("--context-parallel-size 2", 2),
    "cp gathered": ("--context-parallel-size 2 --cp-comm-type allgather", 2),
    "ep": ("--expert-model-parallel-size 2", 2),
    "ep grouped": ("--expert-model-parallel-size 4 --moe-token-dispatcher-type grouped --moe-ranks-per-node 2", 4),
    "ep gathered": ("--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather", 2),
    "etp": ("--expert-tensor-parallel-size 2", 2),
    "tp sp ep": ("--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2", 2),
    "tp sp cp": ("--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2", 4)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["--bf16", "--bf16 --fp8-format e4m3"], ids=["bf16", "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_keep_what_is_calculated(ranks, layout, precision, model):
    arguments, number = LAYOUTS[layout]
    for recompute in ("", "--recompute-granularity selective", "--recompute-granularity full"):
        settings = settings_of(f"{arguments} {precision} {recompute}", number, model)
        job = Job(settings, cuda=False)
        said = stage_bytes(job, 0, job.shapes())
        assert {*ranks.run(number, kept, settings)} == {(said.replayed.kept, said.host)}, recompute
