"""A live teacher: a second model in the same job, frozen, whose final states are computed before each step.

It has stages of its own over the ranks of the job, with the job's data, tensor, context and pipeline ranks, and its
own number of expert-parallel ones. Weights are kept in what is computed in, sharded over data ranks, and gathered a
layer at a time. What travels from it to the objective are final states, [B, S, H] of a data rank's rows on the ranks
that hold the student's head. Its own head stays gathered there: V/tp x H numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_deepseek.checkpoint.convert.mtp import module_prefixes
from megatron_deepseek.checkpoint.integrity import check_sizes, read_checksums
from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.loadable import checkpoint_directory, refuse_damage, stored_architecture
from megatron_deepseek.checkpoint.tracker import is_huggingface
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.fine_tuning_settings import DistillationSettings
from megatron_deepseek.finetuning.distillation.objective import STATES
from megatron_deepseek.finetuning.distillation.same_tokens import refuse_other_vocabulary
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions, place_stages, shape_stages, shard_stages
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.head import OutputHead
from megatron_deepseek.model.lora import freeze_base
from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Rows, StepStatistics
from megatron_deepseek.ops.products import linear
from megatron_deepseek.parallel.collectives import all_gather
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.planning.pipeline_balance import resolve, stages
from megatron_deepseek.settings import CommunicationSettings, LossSettings, OptimizerSettings, Settings
from megatron_deepseek.training.trainer import Trainer, TrainingSpec


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
    root, length = settings.fine_tuning.distillation.teacher, settings.data.seq_length
    files = TeacherFiles.find(root)
    refuse_other_vocabulary(root, settings.data, files.model.vocab_size, settings.model.vocab_size)
    layout = teacher_layout(settings.layout, files.model, settings.fine_tuning.distillation)
    num_stages = len(resolve(settings.model, settings.pipeline, layout.pp, length))
    problem = layout_problem(files.model, layout, length, num_stages)
    if problem is not None:
        raise ValueError(f"--teacher {root}: {problem}")


def layout_problem(model: ModelConfig, layout: Layout, seq_length: int, num_stages: int) -> str | None:
    """Return why a layout with so many pipeline stages cannot hold a model, None if it can."""
    divided = [("heads", model.num_attention_heads, "tensor", layout.tp),
               ("ids", model.vocab_size, "tensor", layout.tp),
               ("units of dense layers", model.intermediate_size, "tensor", layout.tp),
               ("experts", model.n_routed_experts, "expert", layout.ep)]
    if model.n_routed_experts:
        shared = model.n_shared_experts * model.moe_intermediate_size
        divided += [("units of shared experts", shared, "tensor", layout.tp),
                    ("tokens of --seq-length", seq_length, "tensor and context", layout.tp * layout.cp)]
    for what, number, kind, ranks in divided:
        if number % ranks:
            return f"its {number} {what} do not divide over {ranks} {kind}-parallel ranks"
    if model.num_kv_heads % layout.tp and layout.tp % model.num_kv_heads:
        return f"its {model.num_kv_heads} heads of keys and values do not go with {layout.tp} tensor-parallel ranks"
    if seq_length > model.max_position_embeddings:
        return f"--seq-length {seq_length} is longer than its {model.max_position_embeddings} positions"
    if num_stages > model.num_hidden_layers + 1:
        return f"its {model.num_hidden_layers} layers and head do not fill the {num_stages} pipeline stages"
    return None


def teacher_layout(layout: Layout, model: ModelConfig, settings: DistillationSettings) -> Layout:
    """Return the layout of a teacher of architecture `model`: the job's, with its own number of expert ranks.

    Raise ValueError where that does not divide the job's ranks.
    """
    ranks, ep = layout.dp * layout.cp * layout.tp, settings.teacher_expert_model_parallel_size
    if ranks % ep:
        raise ValueError(f"--teacher-expert-model-parallel-size {ep} does not divide the {ranks} ranks of a pipeline "
                         "stage")
    return replace(layout, ep=ep if model.n_routed_experts else 1, etp=1)


def teacher_spec(spec: TrainingSpec, model: ModelConfig) -> TrainingSpec:
    """Return how a model that is only read is built beside one of `spec`: with as many stages, in the same precision,
    its weights gathered a layer at a time.
    """
    build, own = spec.build, spec.build.communication
    communication = CommunicationSettings(cp_comm_type=own.cp_comm_type, moe_ranks_per_node=own.moe_ranks_per_node)
    return replace(
        spec, model=model, stages=stages(model, len(spec.stages), spec.seq_length), optimizer=OptimizerSettings(),
        build=BuildOptions(precision=build.precision, loss=LossSettings(loss_chunk_size=build.loss.loss_chunk_size),
                           communication=communication, reshard_after_forward=True))


def frozen_stages(config: ModelConfig, mine: Iterable[Stage], meshes: Meshes, seq_length: int, options: BuildOptions
                  ) -> list[DeepseekStage]:
    """Return the stages `mine` of this rank, of which nothing is trained, in what is computed in, without weights."""
    made = shape_stages(config, mine, meshes, seq_length, options)
    freeze_base(made, options.precision.activations)
    shard_stages(made, meshes, options)
    place_stages(made, meshes, options)
    return made


def open_model(spec: TrainingSpec, files: TeacherFiles, meshes: Meshes) -> Trainer:
    """Return the model of `files` as a trainer that trains nothing, beside one of `spec`. All ranks call it."""
    trainer = Trainer(teacher_spec(spec, files.model), meshes, make=frozen_stages)
    files.load(trainer.stages)
    return trainer


class LiveTeacher:
    """The teacher of a run. It is opened once the student is there."""

    def __init__(self, settings: DistillationSettings):
        self.settings, self.num_ids = settings, 0
        self._trainer: Trainer | None = None
        self._head_vH: torch.Tensor | None = None  # from the first batch on

    def open(self, student: Trainer) -> None:
        """Build it beside the student, and load its weights. All ranks call it."""
        files, meshes = TeacherFiles.find(self.settings.teacher), student.meshes
        layout = teacher_layout(meshes.layout, files.model, self.settings)
        if layout != meshes.layout:
            meshes = build_meshes(layout, meshes.device)
        self._trainer = open_model(student.spec, files, meshes)
        self.num_ids = min(files.model.vocab_size, student.spec.model.vocab_size)

    def complete(self, student: Trainer, batch: Batch) -> Batch:
        """Return the batch with the teacher's final states. All ranks call it, before each step."""
        plain = replace(batch, per_token={}, per_row={})
        columns = student.spec.model.vocab_size // student.meshes.layout.tp
        states_BSH = self._trainer.read_at_head(plain, partial(self._states, columns), StepStatistics())
        if states_BSH is None:
            states_BSH = batch.weights_BS.new_empty(*batch.tokens_BS.shape, 0)
        return replace(batch, per_token={**batch.per_token, STATES: states_BSH})

    def _states(self, columns: int, predictions: Predictions, rows: Rows) -> torch.Tensor:
        if self._head_vH is None:
            self._head_vH = head_rows(predictions.head, columns)
        return predictions.head.inputs(predictions.states[0])

    def logits(self, states_TH: torch.Tensor) -> torch.Tensor:
        """Return the logits [T, v] of the columns that this rank has of the student's, without a gradient."""
        with torch.no_grad():
            return linear(states_TH, self._head_vH)


def head_rows(head: OutputHead, columns: int) -> torch.Tensor:
    """Return the rows of a head for a TP rank's `columns` of another vocabulary, [columns, H]; 0 behind its end."""
    own_vH, tp = head.rows().detach(), head.tp
    if len(own_vH) == columns:
        return own_vH.clone()
    whole_VH = own_vH if tp.size == 1 else all_gather(own_vH, 0, tp.group)
    mine_vH = whole_VH[tp.rank * columns:(tp.rank + 1) * columns]
    return F.pad(mine_vH, (0, 0, 0, columns - len(mine_vH)))
