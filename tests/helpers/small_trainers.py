"""A small trainer on one rank, and the same step by a plain float64 reference."""

from dataclasses import replace

import pytest
import torch
from reference_model import ReferenceModel
from small_models import V3_SMALL, enliven, random_batch, training_batch, weights_of, whole_stage

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.settings import LossSettings, OptimizerSettings
from megatron_deepseek.training.trainer import StepResult, Trainer, TrainingSpec

SEQ_LENGTH = 6
CONFIG = replace(V3_SMALL, num_nextn_predict_layers=1, attention_bias=True)
LOSS = LossSettings(mtp_loss_scaling_factor=0.3, balance_type="seq_aux_loss", moe_aux_loss_coeff=0.2)
NO_CLIPPING = OptimizerSettings(clip_grad=0.0)
BF16 = Precision(torch.float32, torch.bfloat16)
EXACT = 1e-10  # float64 sums in another order


def trainer(meshes, lively: bool = True, micro_batch_size: int = 2, optimizer: OptimizerSettings = NO_CLIPPING,
            **options) -> Trainer:
    """`options` are BuildOptions'."""
    build = BuildOptions(**{"precision": Precision(torch.float64), "loss": LOSS} | options)
    spec = TrainingSpec(CONFIG, (whole_stage(CONFIG),), "1F1B", SEQ_LENGTH, micro_batch_size, build, optimizer)
    made = Trainer(spec, meshes)
    if lively:
        enliven(made.stages[0])
    return made


def parts_of(sequences: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_batch(CONFIG, sequences, SEQ_LENGTH, seed)


def batch_of(sequences: int, seed: int = 0) -> Batch:
    return training_batch(*parts_of(sequences, seed))


def reference_step(reference: ReferenceModel, tokens, labels, mask) -> tuple[torch.Tensor, ...]:
    """Back-propagates the whole loss; (lm_loss, mtp_loss, balance_loss)."""
    lm_loss, mtp_loss = reference.losses(torch.cat([tokens, labels[:, -1:]], 1), mask)
    balance = reference.balance_loss(tails=False, expert=0.2)
    (lm_loss + 0.3 * mtp_loss + balance).backward()
    return lm_loss, mtp_loss, balance


def reference_of(model) -> ReferenceModel:
    return ReferenceModel(CONFIG, weights_of(model), rope_table(CONFIG, SEQ_LENGTH, torch.device("cpu")),
                          CONFIG.qk_head_dim**-0.5)


def step_of_both(ours: Trainer, reference: ReferenceModel, plain: torch.optim.Optimizer, seed: int,
                 learning_rate: float) -> StepResult:
    """A step on the same batch, of which both have the same losses; gradients of both are left for the caller."""
    parts = parts_of(4, seed)
    result = ours.train_step(training_batch(*parts), learning_rate)
    plain.zero_grad()
    lm_loss, mtp_loss, balance = (loss.item() for loss in reference_step(reference, *parts))
    plain.step()
    assert result.losses.lm_loss == pytest.approx(lm_loss, rel=EXACT)
    assert result.losses.mtp_loss == pytest.approx((mtp_loss,), rel=EXACT)
    assert result.losses.balance_loss == pytest.approx(balance, rel=EXACT)
    return result
