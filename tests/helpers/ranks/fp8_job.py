"""What a rank does in a test of FP8: steps with tiles of any size, so that shards of small models are whole ones."""

from dataclasses import dataclass, replace

import torch
from cases import Case, Reference
from job import Record, run_case, run_reference
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import Precision
from megatron_deepseek.ops.fp8 import e5m6, encoding, gemm as fp8_gemm

FP8 = Precision(torch.float64, fp8=True)
GATHERED = replace(FP8, fp8_gather=True)
WIDE_LENGTH = 256


@dataclass(frozen=True)
class WideCase(Case):
    """Two ranks have whole tiles of 128 of everything that they divide: features, heads' widths, WIDE_LENGTH tokens."""

    @property
    def model(self) -> ModelConfig:
        return replace(
            super().model, vocab_size=64, hidden_size=256, intermediate_size=256, num_attention_heads=4,
            kv_lora_rank=128, q_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
            moe_intermediate_size=128, initializer_range=0.05)


def use_tiles(size: int) -> None:
    """In this process. The models of cases.py are whole tiles of 2, also where two ranks divide them."""
    for module in (e5m6, encoding, fp8_gemm):
        module.TILE = size


def run_fp8(tile: int, case: Case, num_steps: int = 1, precision: Precision = FP8, *length: int) -> Record:
    use_tiles(tile)
    return run_case(case, num_steps, precision, *length)


def run_and_count(tile: int, case: Case, precision: Precision) -> tuple[Record, int]:
    """Of two steps, and the bytes that this rank gave to FSDP's all-gathers."""
    given, gather = [], DefaultAllGather.__call__

    def counted(self, output_tensor, input_tensor, *args, **kwargs):
        given.append(input_tensor.nbytes)
        return gather(self, output_tensor, input_tensor, *args, **kwargs)

    DefaultAllGather.__call__ = counted
    try:
        return run_fp8(tile, case, 2, precision), sum(given)
    finally:
        DefaultAllGather.__call__ = gather


def run_fp8_alone(tile: int, reference: Reference, num_steps: int = 1, precision: Precision = FP8,
                  *length: int) -> Record:
    use_tiles(tile)
    return run_reference(reference, num_steps, precision, *length)
