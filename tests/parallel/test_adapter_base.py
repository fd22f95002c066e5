"""Adapters on ranks, beyond what every layout computes (test_layouts.py has that): the hash of their base."""

import torch
from cases import Case
from job import spec_of

from megatron_deepseek.checkpoint.job.base_hash import base_hash
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.training.trainer import Trainer


def hash_of(case: Case) -> str:
    trainer = Trainer(spec_of(case), build_meshes(case.layout, torch.device("cpu")))
    return base_hash(trainer.stages, torch.device("cpu"))


def test_the_hash_of_a_base_is_the_same_in_every_layout(ranks):
    """Over replicas of TP, slices of experts, copies of a tied embedding on two stages, and shards of data ranks."""
    model = dict(mtp=1, tied=True, shared=2, lora="all+router+mtp")
    layouts = (Case(**model), Case(**model, tp=2, dp=2, ep=2, etp=2), Case(**model, pp=2, schedule="1F1B"))
    found = [hash_ for case in layouts for hash_ in ranks.run(case.layout.world_size, hash_of, case)]
    assert len(found) == 7 and len(set(found)) == 1, found
