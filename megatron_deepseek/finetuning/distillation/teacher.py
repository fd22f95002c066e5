"""A live teacher: a second model in the same job, frozen, whose final states are computed before each step.

It has stages of its own over the ranks of the job, with the job's data, tensor, context and pipeline ranks, and its
own number of expert-parallel ones. Weights are kept in what is computed in, sharded over data ranks, and gathered a
layer at a time. What travels from it to the objective are final states, [B, S, H] of a data rank's rows on the ranks
that hold the student's head. Its own head stays gathered there: V/tp x H numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_deepseek.checkpoint.convert.mtp import module_prefixes
from megatron_deepseek.checkpoint.integrity import check_sizes, read_checksums
from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.loadable import checkpoint_directory, refuse_damage, stored_architecture
from megatron_deepseek.checkpoint.tracker import is_huggingface
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.finetuning.distillation.objective import STATES
from megatron_deepseek.finetuning.distillation.same_tokens import refuse_other_vocabulary
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions, place_stages, shape_stages, shard_stages
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.head import OutputHead
from megatron_deepseek.model.lora import freeze_base
from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Rows, StepStatistics
from megatron_deepseek.parallel.collectives import all_gather
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.runtime.job import training_spec
from megatron_deepseek.settings import (
    CommunicationSettings,
    LossSettings,
    OffloadSettings,
    RecomputeSettings,
    Settings,
)
from megatron_deepseek.training.trainer import Trainer


@dataclass(frozen=True)
class TeacherFiles:
    """A teacher on disk: the directory of its weights, and its architecture, without MTP modules."""

    directory: Path
    stored: ModelConfig

    @property
    def model(self) -> ModelConfig:
        return replace(self.stored, num_nextn_predict_layers=0)

    @classmethod
    def find(cls, root: Path, step: int | None = None, option: str = "--teacher") -> "TeacherFiles":
        """Return the last checkpoint of `root`, that of `step`, or the released model that it is. Raise ValueError,
        which calls it `option`, if it is neither, damaged, or a reward model.
        """
        try:
            directory = checkpoint_directory(root, step)
            if not is_huggingface(directory):
                refuse_damage(directory, check_sizes(directory, read_checksums(directory) or {}))
            stored = stored_architecture(directory)
        except ValueError as error:
            raise ValueError(str(error).replace("--load", option)) from error
        if stored.reward_head:
            raise ValueError(f"{option} {root} is a reward model, which predicts no tokens")
        return cls(directory, stored)

    def load(self, stages: list[DeepseekStage]) -> None:
        """Fill the stages. All ranks call it; raise ValueError where the weights do not fit."""
        checkpoint.load(self.directory, stages, None, dropped=module_prefixes(self.stored))


def check_teacher(settings: Settings) -> None:
    """Raise ValueError for a teacher that is not there, has other tokens, or does not fit into the job's layout."""
    root = settings.fine_tuning.distillation.teacher
    files = TeacherFiles.find(root)
    refuse_other_vocabulary(root, settings.data, files.model.vocab_size, settings.model.vocab_size)
    problem = layout_problem(teacher_settings(settings, files.model, teacher_layout(settings, files.model)))
    if problem is not None:
        raise ValueError(f"--teacher {root}: {problem}")


def layout_problem(settings: Settings) -> str | None:
    """Return why a layout cannot hold the model of `settings`, None if it can."""
    model, layout, length = settings.model, settings.layout, settings.data.seq_length
    divided = [("heads", model.num_attention_heads, "tensor", layout.tp),
               ("ids", model.vocab_size, "tensor", layout.tp),
               ("units of dense layers", model.intermediate_size, "tensor", layout.tp),
               ("experts", model.n_routed_experts, "expert", layout.ep)]
    if model.n_routed_experts:
        shared = model.n_shared_experts * model.moe_intermediate_size
        divided += [("units of shared experts", shared, "tensor", layout.tp),
                    ("tokens of --seq-length", length, "tensor and context", layout.tp * layout.cp)]
    for what, number, kind, ranks in divided:
        if number % ranks:
            return f"its {number} {what} do not divide over {ranks} {kind}-parallel ranks"
    if model.num_kv_heads % layout.tp and layout.tp % model.num_kv_heads:
        return f"its {model.num_kv_heads} heads of keys and values do not go with {layout.tp} tensor-parallel ranks"
    if length > model.max_position_embeddings:
        return f"--seq-length {length} is longer than its {model.max_position_embeddings} positions"
    return _pipeline_problem(settings)


def _pipeline_problem(settings: Settings) -> str | None:
    try:
        resolve(settings.model, settings.pipeline, settings.layout.pp, settings.data.seq_length)
    except ValueError as error:
        return str(error)
    return None


def teacher_layout(settings: Settings, model: ModelConfig) -> Layout:
    """Return the layout of a teacher of architecture `model`: the job's, with its own number of expert ranks.

    Raise ValueError where that does not divide the job's ranks.
    """
    layout, ep = settings.layout, settings.fine_tuning.distillation.teacher_expert_model_parallel_size
    ranks = layout.dp * layout.cp * layout.tp
    if ranks % ep:
        raise ValueError(f"--teacher-expert-model-parallel-size {ep} does not divide the {ranks} ranks of a pipeline "
                         "stage")
    return replace(layout, ep=ep if model.n_routed_experts else 1, etp=1)


def teacher_settings(settings: Settings, model: ModelConfig, layout: Layout) -> Settings:
    """Return the settings by which a teacher of architecture `model` is built in a job of `settings`."""
    run, communication = settings.run, settings.communication
    return replace(
        settings, model=model, layout=layout, lora=None, base=None, pipeline=replace(settings.pipeline, layout=None),
        loss=LossSettings(loss_chunk_size=settings.loss.loss_chunk_size), recompute=RecomputeSettings(),
        offload=OffloadSettings(), communication=CommunicationSettings(
            cp_comm_type=communication.cp_comm_type, moe_ranks_per_node=communication.moe_ranks_per_node),
        run=replace(run, freeze_parameters=(), compile=False, sharding="optim_grads_params"))


def frozen_stages(config: ModelConfig, mine: Iterable[Stage], meshes: Meshes, seq_length: int, options: BuildOptions
                  ) -> list[DeepseekStage]:
    """Return the stages `mine` of this rank, of which nothing is trained, in what is computed in, without weights."""
    stages = shape_stages(config, mine, meshes, seq_length, options)
    freeze_base(stages, options.precision.activations)
    shard_stages(stages, meshes, options)
    place_stages(stages, meshes, options)
    return stages


def open_model(settings: Settings, files: TeacherFiles, meshes: Meshes) -> Trainer:
    """Return the model of `files`, built by `teacher_settings`, as a trainer that trains nothing. All ranks call it."""
    trainer = Trainer(training_spec(settings), meshes, make=frozen_stages)
    files.load(trainer.stages)
    return trainer


class LiveTeacher:
    """The teacher of a run. It is opened once the job's process groups are there."""

    def __init__(self, settings: Settings):
        self.settings, self.num_ids = settings, 0
        self._trainer: Trainer | None = None
        self._head_vH: torch.Tensor | None = None  # from the first batch on

    def open(self, student: Trainer) -> None:
        """Build it beside the student, and load its weights. All ranks call it."""
        files = TeacherFiles.find(self.settings.fine_tuning.distillation.teacher)
        layout, meshes = teacher_layout(self.settings, files.model), student.meshes
        if layout != meshes.layout:
            meshes = build_meshes(layout, meshes.device)
        self._trainer = open_model(teacher_settings(self.settings, files.model, layout), files, meshes)
        self.num_ids = min(files.model.vocab_size, self.settings.model.vocab_size)

    def complete(self, student: Trainer, batch: Batch) -> Batch:
        """Return the batch with the teacher's final states. All ranks call it, before each step."""
        plain = replace(batch, per_token={}, per_row={})
        states_BSH = self._trainer.read_at_head(plain, self._states, StepStatistics())
        if states_BSH is None:
            states_BSH = batch.weights_BS.new_empty(*batch.tokens_BS.shape, 0)
        return replace(batch, per_token={**batch.per_token, STATES: states_BSH})

    def _states(self, predictions: Predictions, rows: Rows) -> torch.Tensor:
        if self._head_vH is None:
            self._head_vH = head_rows(predictions.head, self.settings.model.vocab_size)
        return predictions.head.inputs(predictions.states[0])

    def logits(self, states_TH: torch.Tensor) -> torch.Tensor:
        """Return the logits [T, v] of the columns that this rank has of the student's, without a gradient."""
        with torch.no_grad():
            return F.linear(states_TH, self._head_vH)


def head_rows(head: OutputHead, num_rows: int) -> torch.Tensor:
    """Return this rank's rows of a head as one of `num_rows` rows is divided, [num_rows / tp, H]; 0 behind its end."""
    own_vH, tp = head.rows().detach(), head.tp
    columns = num_rows // tp.size
    if len(own_vH) == columns:
        return own_vH.clone()
    whole_VH = own_vH if tp.size == 1 else all_gather(own_vH, 0, tp.group)
    mine_vH = whole_VH[tp.rank * columns:(tp.rank + 1) * columns]
    return F.pad(mine_vH, (0, 0, 0, columns - len(mine_vH)))
