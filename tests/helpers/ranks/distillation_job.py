"""What a rank does in a test of distillation: steps with a live teacher of another architecture, read from files."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cases import Case
from job import (
    FLOAT64,
    LEARNING_RATE,
    Record,
    Step,
    batch,
    documents,
    make_batch,
    named,
    open_adapters,
    own_rows,
    spec_of,
    whole,
)

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.fine_tuning_settings import DistillationSettings
from megatron_deepseek.finetuning.distillation.objective import Distillation
from megatron_deepseek.finetuning.distillation.teacher import LiveTeacher
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.planning.pipeline_balance import stages
from megatron_deepseek.training.scoring import Scores
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

LENGTH = 16
IDS, OF_TEACHER, OF_STUDENT = 32, 34, 36  # ids of texts, and rows of both embeddings: padding behind them

TEACHER = ModelConfig(
    vocab_size=OF_TEACHER, hidden_size=12, intermediate_size=20, num_hidden_layers=8, num_attention_heads=2,
    kv_lora_rank=6, q_lora_rank=None, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, moe_intermediate_size=8,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, scoring_func="sigmoid",
    topk_method="noaux_tc", n_group=2, topk_group=1, norm_topk_prob=True, max_position_embeddings=LENGTH,
    num_nextn_predict_layers=1)


@dataclass(frozen=True)
class DistillationCase(Case):
    """A layout with a loss of distillation, and the number of ranks that share the teacher's experts."""

    kd_loss: str = "forward-kl"
    teacher_ep: int = 1

    @property
    def model(self) -> ModelConfig:
        return replace(super().model, vocab_size=OF_STUDENT)

    def settings(self, teacher: Path) -> DistillationSettings:
        return DistillationSettings(teacher, self.kd_loss, 1.3, 0.3, 0.6, True, self.teacher_ep)


def run_distillation(case: DistillationCase, teacher: Path, num_steps: int = 2) -> Record:
    return _train(case, spec_of(case, FLOAT64, LENGTH), case.layout, case.settings(teacher), num_steps)


def run_alone(case: DistillationCase, teacher: Path, num_steps: int = 2) -> Record:
    """What one process computes, which takes the batch as a whole and recomputes nothing."""
    build = replace(spec_of(case, FLOAT64, LENGTH).build, loss=case.reference.loss, reshard_after_forward=False)
    spec = replace(spec_of(case, FLOAT64, LENGTH), stages=stages(case.model, 1, LENGTH), schedule="none", build=build,
                   micro_batch_size=case.global_batch_size)
    settings = replace(case.settings(teacher), teacher_expert_model_parallel_size=1)
    return _train(case, spec, Layout(), settings, num_steps)


def _train(case: DistillationCase, spec: TrainingSpec, layout: Layout, settings: DistillationSettings, num_steps: int
           ) -> Record:
    meshes, teacher = build_meshes(layout, torch.device("cpu")), LiveTeacher(settings)
    trainer = Trainer(spec, meshes, Distillation(settings, teacher, case.mtp, 0.5 * case.mtp))
    teacher.open(trainer)
    record = Record()
    open_adapters(trainer)

    def inputs(step: int) -> Batch:
        of_texts = replace(case.model, vocab_size=IDS)
        rows = make_batch(*batch(of_texts, case.global_batch_size, step, LENGTH), **_documents(case, step))
        return teacher.complete(trainer, own_rows(rows, meshes))

    for step in range(num_steps):
        if step == num_steps - 1:  # an evaluation before it must not show in a step
            record.evaluation = trainer.evaluate(inputs(step + 1))
        result = trainer.train_step(inputs(step), learning_rate=LEARNING_RATE)
        gradients = {key: whole(parameter.grad) for key, parameter in named(trainer, "named_parameters")}
        record.steps.append(Step(result.losses, result.grad_norm, result.expert_counts, result.dropped, gradients))
    record.weights = {key: whole(value) for how in ("named_parameters", "named_buffers")
                      for key, value in named(trainer, how)}
    record.scores = Scores(torch.zeros(1))  # test_layouts.py compares those of every layout
    return record


def _documents(case: DistillationCase, step: int) -> dict[str, torch.Tensor]:
    return {"documents_BS": documents(case.global_batch_size, step, LENGTH)} if case.packed else {}
