"""What a rank does in a test: train a few steps, evaluate, and hand back everything that a layout must not change."""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from cases import NUM_EXPERTS, SEQ_LENGTH, Case, Reference
from objectives import held_out_of, inputs_of, objective_of
from random_base import RandomBase
from torch.distributed.tensor import DTensor

from megatron_deepseek.checkpoint.job.base_weights import fill_held
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.model.architecture.adapters import B, factor_of
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.init import fill_normal
from megatron_deepseek.model.positions import REPLAYED, TOKEN_KEYS
from megatron_deepseek.model.router import Router
from megatron_deepseek.parallel import shards
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.settings import OptimizerSettings, PipelineSettings
from megatron_deepseek.training.scoring import Scores
from megatron_deepseek.training.token_keys import keys_of
from megatron_deepseek.training.trainer import Losses, TrainingSpec, Trainer

FLOAT64 = Precision(torch.float64)

# AdamW divides by sqrt(v) + eps: with the usual eps a gradient that is zero but for rounding moves a weight by the
# whole learning rate, and rounding differs between layouts. A large eps keeps the update in proportion to the gradient.
OPTIMIZER = OptimizerSettings(adam_eps=1e-3, clip_grad=0.5)
LEARNING_RATE, BIAS_RATE = 1e-2, 1e-2
NEVER_CHOSEN = (2, 3)  # experts: one whole routing group, and with 4 expert ranks all experts of one


@dataclass
class Step:
    """One training step; gradients are whole, by stage and name, so that each copy of a shared one is there."""

    losses: Losses
    grad_norm: float
    expert_counts: dict[str, torch.Tensor]
    dropped: float
    gradients: dict[tuple[int, str], torch.Tensor]


@dataclass
class Record:
    """What one rank saw. `weights` holds buffers too: the routers' biases. `scores` are of this data rank's `rows`."""

    steps: list[Step] = field(default_factory=list)
    weights: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    evaluation: Losses | None = None
    scores: Scores | None = None
    rows: slice = field(default_factory=lambda: slice(None))


def batch(model: ModelConfig, size: int, step: int, length: int = SEQ_LENGTH
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and label mask [size, length] of the global batch. Rows have between few and almost all labels; at
    step 1 the first two rows (a micro-batch) have none, at step 2 the second half (whole data ranks) has none.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(model.vocab_size, (size, length + 1), generator=generator)
    mask = torch.rand(size, length, generator=generator) < torch.linspace(0.2, 0.95, size).unsqueeze(1)
    if step == 1 and size > 2:
        mask[:2] = False
    if step == 2:
        mask[(size + 1) // 2:] = False
    return tokens[:, :-1], tokens[:, 1:], mask


def make_batch(tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, **more) -> Batch:
    return Batch(tokens_BS=tokens, labels_BS=labels, weights_BS=mask.float(), **more)


def own_rows(whole_batch: Batch, meshes: Meshes) -> Batch:
    """This data rank's rows of a global batch."""
    own = whole_batch.num_rows // meshes.layout.dp
    return whole_batch.rows(slice(meshes.rank("dp") * own, (meshes.rank("dp") + 1) * own))


STARTS = (0.3, 1.0, 0.3, 0.0)  # how often a token begins a document: rows of some, of one for each token, of only one


def documents(size: int, step: int, length: int = SEQ_LENGTH) -> torch.Tensor:
    """[size, length]: the document of each token; STARTS in turn over rows and steps."""
    often = torch.tensor(STARTS)[(torch.arange(size) + step) % len(STARTS)]
    starts = torch.rand(size, length, generator=torch.Generator().manual_seed(100 + step)) < often[:, None]
    return starts.long().cumsum(1)


def real_tokens(size: int, step: int, length: int = SEQ_LENGTH) -> torch.Tensor:
    """[size, length]: rows of between one token and all; the last row of step 1 is all padding."""
    lengths = torch.randint(1, length + 1, (size, 1), generator=torch.Generator().manual_seed(200 + step))
    if step == 1 and size > 1:
        lengths[-1] = 0
    return torch.arange(length) < lengths


def experts_to_replay(model: ModelConfig, size: int, step: int, length: int = SEQ_LENGTH) -> torch.Tensor:
    """[size, length, L, K]: experts that no router chose, for some tokens of each row in each layer; -1 for the others.
    """
    generator = torch.Generator().manual_seed(600 + step)
    shape = size, length, model.num_moe_layers
    experts = torch.rand(*shape, model.n_routed_experts, generator=generator).argsort(-1)
    free = torch.rand(shape, generator=generator) < 0.3
    return experts[..., :model.num_experts_per_tok].to(torch.int16).masked_fill(free.unsqueeze(-1), -1)


def optimizer_of(moments: str) -> OptimizerSettings:
    return replace(OPTIMIZER, exp_avg_dtype=moments, exp_avg_sq_dtype=moments)


def sources(size: int) -> torch.Tensor:
    """[size, K]: rows of three datasets in turn; a fourth that no row is from."""
    return torch.nn.functional.one_hot(torch.arange(size) % 3, 4).bool()


def spec_of(case: Case, precision: Precision = FLOAT64, seq_length: int = SEQ_LENGTH) -> TrainingSpec:
    build = BuildOptions(precision=precision, loss=case.loss, recompute=case.recomputation,
                         communication=case.communication, offload=case.offload, reshard_after_forward=case.reshard,
                         frozen=case.frozen_names, lora=case.adapters, compiler=case.compiler)
    return TrainingSpec(case.model, case.stages, case.schedule, seq_length, case.micro_batch_size, build,
                optimizer_of(case.moments))


def run_case(case: Case, num_steps: int = 3, precision: Precision = FLOAT64, seq_length: int = SEQ_LENGTH) -> Record:
    sizes = case.first_batch_size, case.global_batch_size
    return train(spec_of(case, precision, seq_length), case.layout, sizes, num_steps, case.packed, case.padded,
                 case.objective, case.replay)


def run_reference(reference: Reference, num_steps: int = 3, precision: Precision = FLOAT64,
                  seq_length: int = SEQ_LENGTH) -> Record:
    stages = resolve(reference.model, PipelineSettings(), 1, seq_length)
    spec = TrainingSpec(reference.model, stages, "none", seq_length, reference.micro_batch_size,
                BuildOptions(precision=precision, loss=reference.loss, frozen=reference.frozen, lora=reference.lora),
                optimizer_of(reference.moments))
    sizes = reference.first_batch_size, reference.global_batch_size
    return train(spec, Layout(), sizes, num_steps, reference.packed, reference.padded, reference.objective,
                 reference.replay)


def train(spec: TrainingSpec, layout: Layout, batch_sizes: tuple[int, int], num_steps: int, packed: bool = False,
          padded: bool = False, objective: str = "next_token", replay: bool = False) -> Record:
    """`batch_sizes`: sequences of the first step's global batch, and of every other's."""
    meshes = build_meshes(layout, torch.device("cpu"))
    trainer = Trainer(spec, meshes, objective_of(objective, spec.model.num_nextn_predict_layers))
    held_out = held_out_of(objective, spec.model.num_nextn_predict_layers)
    record = Record()
    withhold(trainer)
    open_adapters(trainer)
    fill_held(trainer.stages, RandomBase(spec.model, 0.1), meshes.device)
    bias_rate = BIAS_RATE if spec.model.topk_method == "noaux_tc" else 0.0

    def inputs(step: int) -> Batch:
        size = batch_sizes[step > 0]
        tokens, labels, mask = batch(spec.model, size, step, spec.seq_length)
        real = real_tokens(size, step, spec.seq_length) if padded else None
        mask = mask if real is None else mask & real
        weights = mask * (0.5 + tokens % 2) if objective == "samples" else mask
        more = inputs_of(objective, size, step, spec.seq_length, spec.model.vocab_size)
        if spec.build.lora is not None and step < num_steps:  # what is held out loses nothing
            more = {**more, TOKEN_KEYS: keys_of(1, step * size + torch.arange(size), spec.seq_length)}
        if replay:
            more = {**more, REPLAYED: experts_to_replay(spec.model, size, step, spec.seq_length)}
        return own_rows(make_batch(tokens, labels, weights, real_BS=real, sources_BK=sources(size), per_token=more,
                                   documents_BS=documents(size, step, spec.seq_length) if packed else None), meshes)

    for step in range(num_steps):
        if 0 < step == num_steps - 1:  # an evaluation before it must not show in a step
            record.evaluation = trainer.evaluate(inputs(num_steps), held_out)
        result = trainer.train_step(inputs(step), learning_rate=LEARNING_RATE, bias_rate=bias_rate)
        gradients = {key: whole(parameter.grad) for key, parameter in named(trainer, "named_parameters")}
        record.steps.append(Step(result.losses, result.grad_norm, result.expert_counts, result.dropped, gradients))
    record.weights = {key: whole(value) for how in ("named_parameters", "named_buffers")
                      for key, value in named(trainer, how)}
    record.evaluation = record.evaluation or trainer.evaluate(inputs(num_steps), held_out)
    scored = inputs(num_steps)
    record.scores = trainer.score(scored, experts=True)
    record.rows = slice(meshes.rank("dp") * scored.num_rows, (meshes.rank("dp") + 1) * scored.num_rows)
    dist.barrier()
    return record


def withhold(trainer: Trainer) -> None:
    """No token may choose the experts NEVER_CHOSEN, where the router has a bias to say so."""
    for stage in trainer.stages:
        for module in stage.modules():
            if isinstance(module, Router) and hasattr(module, "e_score_correction_bias"):
                assert module.e_score_correction_bias.shape == (NUM_EXPERTS,)
                module.e_score_correction_bias[list(NEVER_CHOSEN)] = -10.0


def open_adapters(trainer: Trainer) -> None:
    """Adapters begin with a B of zero, behind which A gets no gradient: here with an ordinary one."""
    for stage in trainer.stages:
        for name, parameter in stage.named_parameters():
            if factor_of(name) == B:
                fill_normal(parameter, 0.2, 0, name)


def named(trainer: Trainer, how: str):
    """((stage, name), tensor) of this rank's parameters or buffers, not of the bytes that frozen ones are kept as."""
    for index, stage in zip(trainer.indices, trainer.stages):
        for name, tensor in getattr(stage, how)():
            if tensor.is_floating_point():
                yield (index, name), tensor


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor gathered from its shards, copied."""
    if tensor is None:
        return None
    return (shards.whole(tensor) if isinstance(tensor, DTensor) else tensor).detach().clone()
