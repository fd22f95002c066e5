"""What a rank does in a test of FP8: a step of a model whose shards are whole tiles."""

from dataclasses import dataclass, replace

import torch
from cases import Case
from job import OPTIMIZER, Record, plan_of, run_case, run_reference, train

from megatron_deepseek.config import ModelConfig
from megatron_deepseek.model.build import Precision
from megatron_deepseek.ops import e5m6, fp8, fp8_gemm
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.settings import PipelineSettings
from megatron_deepseek.training.trainer import Plan

FP8 = Precision(torch.float64, fp8=True)


@dataclass(frozen=True)
class WideCase(Case):
    """Every dimension that ranks may share is whole tiles: features, heads' widths; and `length`, of a sequence."""

    width: int = 256
    length: int = 128

    @property
    def model(self) -> ModelConfig:
        return replace(
            super().model, vocab_size=64, hidden_size=256, intermediate_size=self.width, num_attention_heads=4,
            kv_lora_rank=128, q_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
            moe_intermediate_size=128, first_k_dense_replace=self.num_layers - 1, initializer_range=0.05)


def run_fp8(case: WideCase) -> Record:
    plan = replace(plan_of(case, FP8), seq_length=case.length)
    return train(plan, case.layout, case.global_batch_size, 1, case.packed)


def run_fp8_alone(case: WideCase, micro_batch_size: int) -> Record:
    """The same on one process, in micro-batches of that many sequences."""
    stages = resolve(case.model, PipelineSettings(), 1, case.length)
    plan = Plan(case.model, stages, "none", case.length, micro_batch_size, precision=FP8, optimizer=OPTIMIZER,
                loss=case.loss)
    return train(plan, Layout(), case.global_batch_size, 1, case.packed)


def use_small_tiles() -> None:
    """Tiles of 2, in this process: the shards of the smallest models are whole ones."""
    for module in (e5m6, fp8, fp8_gemm):
        module.TILE = 2


def run_small_tiles(case: Case, precision: Precision = FP8) -> Record:
    use_small_tiles()
    return run_case(case, 2, precision)


def run_small_tiles_alone(case: Case, precision: Precision = FP8) -> Record:
    use_small_tiles()
    return run_reference(case.reference, 2, precision)
