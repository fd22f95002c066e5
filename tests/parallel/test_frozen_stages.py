"""Stages in front of the first trained parameter: no backward, nothing sent back, and weights that are shards again."""

import pytest
import torch
from cases import Case
from job import batch, make_batch, own_rows, spec_of
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.distributed.tensor import DTensor
from torch_versions import knows_who_needs_gradients

from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.training.trainer import Trainer


def watched(case: Case) -> tuple[set[int], set[int], set[int], bool]:
    """Of a step: this rank's stages that ran a backward, that sent gradients, that got some; and whether all weights
    are shards afterwards.
    """
    ran, sent, got = set(), set(), set()

    def watch(name: str, seen: set[int]) -> None:
        method = getattr(_PipelineStageBase, name)

        def wrapped(self, *args, **kwargs):
            result = method(self, *args, **kwargs)
            seen.update([self.stage_index] if result else [])
            return result

        setattr(_PipelineStageBase, name, wrapped)

    for name, seen in (("backward_maybe_with_nosync", ran), ("get_bwd_send_ops", sent), ("get_bwd_recv_ops", got)):
        watch(name, seen)
    trainer = Trainer(spec_of(case), build_meshes(case.layout, torch.device("cpu")))
    whole_batch = make_batch(*batch(case.model, case.global_batch_size, 0))
    trainer.train_step(own_rows(whole_batch, trainer.meshes), learning_rate=0.1)
    shards = all(isinstance(parameter, DTensor) for stage in trainer.stages for parameter in stage.parameters())
    return ran, sent, got, shards


@knows_who_needs_gradients
@pytest.mark.parametrize("schedule, virtual", [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2),
                                               ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2), ("DualPipeV", 2)])
def test_nothing_goes_back_in_front_of_the_first_trained_stage(ranks, schedule, virtual):
    """Of 2 stages on 2 ranks the head is trained, on the last; of 4 attention of the third."""
    case = Case(pp=2, schedule=schedule, virtual=virtual, dp=2, microbatches=4, mtp=1,
                trained="lm_head.weight" if virtual == 1 else "model.layers.2.self_attn.*")
    first, number = (1, 2) if virtual == 1 else (2, 4)
    assert number == case.num_stages and (virtual == 1 or 2 in case.stages[2].layers)
    ran, sent, got, shards = zip(*ranks.run(4, watched, case))
    assert set().union(*ran) == set(range(first, number))
    assert set().union(*sent) == set(range(first + 1, number))
    assert set().union(*got) == set(range(first, number - 1))
    assert all(shards)
