"""What the layers of a rank keep in layouts of several ranks: calculated, and seen by saved-tensor hooks on each rank.

Experts are chosen by position, so that every rank gets as many rows; all else is as in training.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import FunctionType

import pytest
import torch
from job import OPTIMIZER
from saved_bytes import MostSaved, bytes_of, saved_bytes
from small_models import LLAMA_SMALL, V2_SMALL, V3_SMALL, random_batch, training_batch, whole_stage
from torch.distributed.fsdp import FSDPModule

from megatron_deepseek.arguments import parse
from megatron_deepseek.model.build import BuildOptions, Precision, build_stages
from megatron_deepseek.model.step import StepContext
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.parallel.schedule_rules import SCHEDULES
from megatron_deepseek.parallel.stage import ReducingStage
from megatron_deepseek.parallel.zero_bubble import DeferredGradients
from megatron_deepseek.planning.arrivals import most_waiting
from megatron_deepseek.planning.engines import OURS
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.planning.replay import StageBytes, replay
from megatron_deepseek.planning.stage_bytes import stage_bytes
from megatron_deepseek.settings import Settings
from megatron_deepseek.torch_private import fsdp_parameter_group
from megatron_deepseek.training.division import divide
from megatron_deepseek.training.next_token import NextToken
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

LENGTH, ROWS = 16, 2
STATE = LENGTH * ROWS * V3_SMALL.hidden_size * 2  # bytes that a stage passes on in bfloat16
MODELS = {"v2": replace(V2_SMALL, num_attention_heads=4), "v3": replace(V3_SMALL, num_attention_heads=4)}
GROUPED = {"qwen2": replace(LLAMA_SMALL, qkv_bias=True), "qwen3": replace(LLAMA_SMALL, qk_norm=True)}


def settings_of(arguments: str, ranks: int, model: str, layers: int | None = None) -> Settings:
    text = (f"--model tiny --data-path x --train-iters 1 --micro-batch-size {ROWS} --seq-length {LENGTH} "
            f"--moe-router-force-load-balancing --mtp-num-layers 0 {arguments}")
    config = (MODELS | GROUPED)[model]
    return replace(parse(text.split(), ranks),
                   model=replace(config, num_hidden_layers=layers or config.num_hidden_layers))


def kept(settings: Settings, meshes: Meshes) -> tuple[int, int]:
    """Return what hooks see on this rank, on the device and the host."""
    run, config = settings.run, settings.model
    precision = Precision(torch.float32, torch.bfloat16 if run.bf16 else None, fp8=run.fp8_format is not None)
    options = BuildOptions(precision=precision, loss=settings.loss, recompute=settings.recompute,
                           communication=settings.communication, offload=settings.offload)
    (model,) = build_stages(config, [whole_stage(config)], meshes, LENGTH, options)
    model.train()
    objective = NextToken()
    batch = training_batch(*random_batch(config, ROWS, LENGTH))
    division = divide(batch, objective, ContextParallel(meshes.cp), ROWS, True)
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
    "tp 4, one head a rank": ("--tensor-model-parallel-size 4 --sequence-parallel", 4),
    "tp sp cp": ("--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2", 4)}


# Experts' ranks are no matter of attention.
FORMS = dict.fromkeys(("ep", "ep grouped", "ep gathered", "etp", "tp sp ep"), tuple(MODELS))
QUICK = [("tp sp", ("v3", "qwen3"))]  # in `make test`: latent and grouped-query attention, each with all that it has
CASES = [*QUICK, ("tp sp", ("v2", "qwen2")), *((layout, FORMS.get(layout, (*MODELS, *GROUPED)))
                                               for layout in LAYOUTS if layout != "tp sp")]


def kept_of_each(runs: list[Settings]) -> list[tuple[int, int]]:
    """Return what is kept in each of `runs`, which are of one layout."""
    meshes = build_meshes(runs[0].layout, torch.device("cpu"))
    return [kept(settings, meshes) for settings in runs]


@pytest.mark.parametrize("layout, models", [
    pytest.param(*case, id=f"{case[0]}-{'+'.join(case[1])}", marks=() if case in QUICK else pytest.mark.slow)
    for case in CASES])
def test_layers_keep_what_is_calculated(ranks, layout, models):
    """In bfloat16 and FP8, with nothing, modules and whole layers recomputed."""
    arguments, number = LAYOUTS[layout]
    runs = [settings_of(f"{arguments} --bf16 {precision} {recompute}", number, model)
            for model in models for precision in ("", "--fp8-format e4m3")
            for recompute in ("", "--recompute-granularity selective", "--recompute-granularity full")]
    jobs = [Job(settings, cuda=False) for settings in runs]
    said = [stage_bytes(job, 0, job.shapes()) for job in jobs]
    calculated = [(each.replayed.kept, each.host) for each in said]
    assert ranks.run(number, kept_of_each, runs) == [calculated] * number


def kept_in_a_step(settings: Settings) -> tuple[int, int]:
    """Return the most that graphs hold at once on this rank during a step, and the bytes of its receive buffers."""
    layout, schedule = settings.layout, settings.pipeline.schedule
    meshes = build_meshes(layout, torch.device("cpu"))
    stages = resolve(settings.model, settings.pipeline, layout.pp, LENGTH)
    build = BuildOptions(precision=Precision(torch.float32, torch.bfloat16), loss=settings.loss,
                         recompute=settings.recompute)
    spec = TrainingSpec(settings.model, stages, schedule, LENGTH, ROWS, build, OPTIMIZER)
    trainer, receives = Trainer(spec, meshes, NextToken()), Receives()
    step = training_batch(*random_batch(settings.model, settings.batch.global_batch_size, LENGTH))
    trainer.train_step(step, learning_rate=1e-3, bias_rate=0.0)
    weights = [getattr(each, "_local_tensor", each) for stage in trainer.stages
               for unit in stage.modules() if isinstance(unit, FSDPModule) for each in gathered_weights(unit)]
    buffers = [each for stage in trainer.stages for each in (*stage.buffers(), stage.rope_2SD)]
    most = MostSaved([*weights, *buffers, step.tokens_BS])
    with most, pytest.MonkeyPatch.context() as monkeypatch:
        receives.watch(monkeypatch)
        trainer.train_step(step, learning_rate=1e-3, bias_rate=0.0)
    return most.most, sum(receives.most.values())


class Receives:
    """Counts the bytes of the receives that were started for a stage's forwards, and its backwards, and not yet used.
    """

    def __init__(self):
        self.waiting, self.most = Counter(), Counter()

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind, started, used in (("F", "get_fwd_recv_ops", "forward_one_chunk"),
                                    ("B", "get_bwd_recv_ops", "backward_one_chunk")):
            monkeypatch.setattr(ReducingStage, started, self._starting(kind, getattr(ReducingStage, started)))
            monkeypatch.setattr(ReducingStage, used, self._using(kind, getattr(ReducingStage, used)))

    def _starting(self, kind: str, start: Callable) -> Callable:
        def started(stage, number):
            operations = start(stage, number)
            key = kind, stage.stage_index
            self.waiting[key] += sum(each.tensor.nbytes for each in operations)
            self.most[key] = max(self.most[key], self.waiting[key])
            return operations

        return started

    def _using(self, kind: str, use: Callable) -> Callable:
        def used(stage, *args, **more):
            self.waiting[kind, stage.stage_index] -= STATE if self.waiting[kind, stage.stage_index] else 0
            return use(stage, *args, **more)

        return used


def gathered_weights(unit: FSDPModule) -> list[torch.Tensor]:
    """Return the whole weights of a unit: their storages stay the same from step to step."""
    group = fsdp_parameter_group(unit)
    whole = [each.unsharded_param for each in (group.fsdp_params if group else ())]
    return [getattr(each, "_local_tensor", each).detach() for each in whole]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_keeps_what_replaying_its_actions_says(ranks, schedule):
    """The most that graphs hold at any moment of a step, and what has arrived and waits. What a stage passed on is held
    outside of graphs, and so is what waits for weight gradients. Graphs of the last stage hold the labels and weights
    of all rows too, which are the step's.
    """
    rows = 4 * ROWS
    settings = settings_of(f"--bf16 --pipeline-model-parallel-size 2 --pipeline-schedule {schedule} --num-layers 4 "
                           f"--mtp-num-layers 0 --global-batch-size {rows}", 2, "v3", 4)
    job = Job(settings, replace(OURS, keeps_output=False), cuda=False)
    assert job.numbers.plain(job.shapes().stream, settings.model.hidden_size) == STATE
    expected = []
    most = most_waiting(schedule, 2, job.virtual_stages, 4)
    for rank in range(2):
        held = job.held(rank)
        kept_by = {stage: StageBytes(stage_bytes(job, stage, job.shapes()).replayed.kept) for stage in held}
        labels = rows * LENGTH * (8 + 4) * (len(job.stages) - 1 in held)
        arrived = STATE * sum(most[kind, stage] for kind, stage in most if stage in held)
        expected.append((replay(job.actions(rank), kept_by).bytes + labels, arrived))
    assert ranks.run(2, kept_in_a_step, settings) == expected


def tensors_in(held) -> Iterator[torch.Tensor]:
    """Yield the tensors that a closure of a weight's gradient holds, through tuples and other closures."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (tuple, list)):
        for each in held:
            yield from tensors_in(each)
    elif isinstance(held, FunctionType):
        for cell in held.__closure__ or ():
            yield from tensors_in(cell.cell_contents)


def left_for_weight_gradients(settings: Settings, meshes: Meshes) -> set[tuple[int, int]]:
    """Return (stage, bytes) of what each backward leaves on this rank until its weight gradients are made."""
    found, left, defer, take = set(), defaultdict(list), DeferredGradients.defer, DeferredGradients.take

    def deferred(handle, weight, gradient):
        left[id(handle)] += tensors_in(gradient)
        defer(handle, weight, gradient)

    def taken(handle):
        found.add((indices[id(handle)], bytes_of(left.pop(id(handle)))))
        return take(handle)

    stages = resolve(settings.model, settings.pipeline, settings.layout.pp, LENGTH)
    build = BuildOptions(precision=Precision(torch.float32, torch.bfloat16, fp8=settings.run.fp8_format is not None),
                         loss=settings.loss, recompute=settings.recompute)
    trainer = Trainer(TrainingSpec(settings.model, stages, settings.pipeline.schedule, LENGTH, ROWS, build, OPTIMIZER),
                      meshes, NextToken())
    indices = {id(each): index for each, index in zip(trainer.pipeline.deferred, trainer.indices)}
    step = training_batch(*random_batch(settings.model, settings.batch.global_batch_size, LENGTH))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(DeferredGradients, "defer", deferred)
        monkeypatch.setattr(DeferredGradients, "take", taken)
        trainer.train_step(step, learning_rate=1e-3, bias_rate=0.0)
    return found


def left_of_each(runs: list[Settings]) -> list[set[tuple[int, int]]]:
    """Return what is left in each of `runs`, which are of one layout."""
    meshes = build_meshes(runs[0].layout, torch.device("cpu"))
    return [left_for_weight_gradients(settings, meshes) for settings in runs]


@pytest.mark.parametrize("model", ["v3", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_what_waits_for_weight_gradients(ranks, model):
    """In bfloat16 and FP8; also the inputs that were recomputed wait."""
    runs = [settings_of(f"--bf16 {precision} {recompute} --pipeline-model-parallel-size 2 --pipeline-schedule "
                        f"ZBVZeroBubble --num-layers 4 --global-batch-size {4 * ROWS}", 2, model, 4)
            for precision in ("", "--fp8-format e4m3")
            for recompute in ("", "--recompute-granularity selective", "--recompute-granularity full")]
    jobs = [Job(settings, cuda=False) for settings in runs]
    said = [{(stage, stage_bytes(job, stage, job.shapes()).replayed.waiting) for stage in range(4)} for job in jobs]
    seen = zip(*ranks.run(2, left_of_each, runs))
    assert [set().union(*of_ranks) for of_ranks in seen] == said
