"""Adapters beside a base of NF4 or FP8 in layouts against one process, in float64: no bit of a weight may differ."""

from dataclasses import replace

import pytest
import torch
from base_job import BaseCase, run_base, run_base_alone
from compare import differences
from fp8_job import FP8, WIDE_LENGTH
from job import spec_of
from random_base import RandomBase
from torch_versions import keeps_bytes

from megatron_deepseek.checkpoint.job.base_hash import base_hash
from megatron_deepseek.checkpoint.job.base_weights import fill_held
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.training.trainer import Trainer

CPU = torch.device("cpu")

CASES = (
    BaseCase(tp=2, dp=2, sp=True, ep=2, etp=2, shared=2, microbatches=2),
    BaseCase(dp=3, microbatches=2, reshard=True, bits=8),
    BaseCase(pp=2, schedule="ZBVZeroBubble", virtual=2, microbatches=2, shared=2, recompute="full",
             offload_optimizer=True),
    BaseCase(pp=2, schedule="DualPipeV", virtual=2, dp=2, ep=2, microbatches=4, turns=True, bits=8,
             attention="no_q_lora"),
    BaseCase(tp=2, cp=2, etp=2, microbatches=2, bits=8, shared=2, recompute="layernorm,mla_up_proj,moe_act"),
    BaseCase(tp=2, router="greedy", ep=2, attention="one_key_head", microbatches=2, offload_layers=1),
)

pytestmark = keeps_bytes


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case is CASES[0] else pytest.mark.slow)
                                  for case in CASES], ids=str)
def test_layout_computes_what_one_process_does(ranks, case):
    """Losses, every gradient of A and B, updated weights."""
    (alone,) = ranks.run(1, run_base_alone, case)
    assert not differences(ranks.run(case.layout.world_size, run_base, case), alone)


def hash_of(case: BaseCase) -> str:
    spec = spec_of(case)
    trainer = Trainer(replace(spec, build=replace(spec.build, base=case.base)), build_meshes(case.layout, CPU))
    return base_hash(trainer.stages, CPU, fill_held(trainer.stages, RandomBase(spec.model), CPU))


def test_the_hash_is_the_same_in_every_layout(ranks):
    """Of codes of replicated weights one rank counts, and of each weight the columns and rows that a rank has."""
    layouts = BaseCase(shared=2), BaseCase(shared=2, tp=2, dp=2, ep=2, etp=2)
    found = [hash_ for case in layouts for hash_ in ranks.run(case.layout.world_size, hash_of, case)]
    assert len(found) == 5 and len(set(found)) == 1, found


@pytest.mark.slow
def test_fp8_products_of_released_weights(ranks):
    """Tiles of a rank are those of one process, but for scales that sums in another order round the other way."""
    case, options = BaseCase(tp=2, sp=True, ep=2, shared=2, bits=8), (1, FP8, WIDE_LENGTH)
    (alone,) = ranks.run(1, run_base_alone, case, *options)
    assert not differences(ranks.run(2, run_base, case, *options), alone, 1e-7)
