"""How often the host reads what the device computed in a step, on every rank of many layouts.

A step reads twice: what losses are divided by, and at its end everything else at once. Each MoE layer adds one read for
each micro-batch, of the counts that an exchange of tokens needs as sizes, and one for each time that it is recomputed.
With --offload-optimizer gradients go to the host, which is waited for, so that such layouts are not here.
"""

from collections import Counter

import pytest
import torch
from cases import WIDE_CASES, Case, cost, covering_cases
from host_reads import host_reads
from job import batch, documents, inputs_of, make_batch, objective_of, own_rows, sources, spec_of

from megatron_deepseek.model.moe import MoE
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.training.trainer import Trainer

READS_OF_STEP = 2


def reads_of_step(case: Case) -> tuple[Counter, int]:
    """The lines that read in a rank's second step, and how many reads its MoE layers may add."""
    meshes = build_meshes(case.layout, torch.device("cpu"))
    trainer = Trainer(spec_of(case), meshes, objective_of(case.objective, case.mtp))
    size = case.global_batch_size
    own = own_rows(make_batch(*batch(case.model, size, 0), sources_BK=sources(size),
                              per_token=inputs_of(case.objective, size, 0, 8, case.model.vocab_size),
                              documents_BS=documents(size, 0, 8) if case.packed else None), meshes)
    trainer.train_step(own, 1e-3, 1e-3)
    with host_reads() as reads:
        trainer.train_step(own, 1e-3, 1e-3)
    depths = trainer.objective.num_depths
    unused = {id(module) for stage in trainer.stages for layer in stage.mtp_layers(depths)
              for module in layer.modules()}
    layers = [module for stage in trainer.stages for module in stage.modules()
              if isinstance(module, MoE) and id(module) not in unused]
    forwards = 2 if case.recompute == "full" else 1
    reads = [line for line in reads if not line.startswith("ops/documents.py")]  # documents are always on the host
    return Counter(reads), len(layers) * case.microbatches * forwards


CASES = sorted([*covering_cases(), *WIDE_CASES], key=lambda case: cost(vars(case)))
SOME = [case for case in CASES if case.router != "dense" and not case.offload_optimizer][::7]
SHOWN = [pytest.param(case, id=str(case), marks=() if number < 3 else pytest.mark.slow)
         for number, case in enumerate(SOME)]


@pytest.mark.parametrize("case", SHOWN)
def test_reads_of_a_step(ranks, case):
    for reads, of_layers in ranks.run(case.layout.world_size, reads_of_step, case):
        assert reads.total() <= READS_OF_STEP + of_layers, reads
