"""What is said of all weights together: hashes that name a planted difference and no other, and the norm and the zeros,
in which each parameter counts once.
"""

import pytest
import torch
import torch.distributed as dist
from cases import Case
from job import batch, make_batch, own_rows, spec_of
from torch.distributed.tensor import DTensor

from megatron_deepseek.model.build import Precision
from megatron_deepseek.parallel import shards
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.runtime import replicas
from megatron_deepseek.runtime.replicas import ReplicasDiffer, check_replicas, describe_differences
from megatron_deepseek.training.optimizer import count_zeros, parameter_norm
from megatron_deepseek.training.trainer import Trainer

FP8 = Precision(torch.float32, torch.bfloat16, fp8=True, fp8_gather=True)


Counts = tuple[float, int, dict[str, tuple[float, int]]]


def counts_of(trainer: Trainer) -> Counts:
    """The norm, the zeros of the gradient, and of each parameter here, gathered whole, its sum of squares and zeros."""
    whole = {name: (shards.whole(parameter.detach()).double().square().sum().item(),
                    int((shards.whole(parameter.grad) == 0).sum()))
             for stage in trainer.stages for name, parameter in stage.named_parameters()}
    return (parameter_norm(trainer.parameters, torch.device("cpu")),
            count_zeros(trainer.parameters, torch.device("cpu")), whole)


def compare(case: Case, precision: Precision, plants: dict[int, str]) -> tuple[Counts, list[str | None]]:
    """The counts after a step, and what a rank is told before and after a number of the parameter or buffer
    `plants[rank]` is changed on it.
    """
    trainer = Trainer(spec_of(case, precision), build_meshes(case.layout, torch.device("cpu")))
    trainer.train_step(own_rows(make_batch(*batch(case.model, case.global_batch_size, 0)), trainer.meshes), 0.1, 0.1)
    counts, told = counts_of(trainer), []
    for plant in (None, plants.get(dist.get_rank())):
        for stage in trainer.stages:
            held = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
            if plant in held:
                tensor = held[plant].detach()
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)[0] += 1.0
        try:
            check_replicas(trainer.stages, 3)
            told.append(None)
        except ReplicasDiffer as error:
            told.append(str(error))
    assert all(isinstance(parameter, DTensor) for stage in trainer.stages for parameter in stage.parameters())
    return counts, told


NORM, BIAS = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("case, precision, plants, named", [
    pytest.param(Case(dp=2), FP8, {1: BIAS}, f"{BIAS} on rank 1", marks=pytest.mark.slow),
    pytest.param(Case(tp=2, dp=2, ep=2), Precision(torch.float32), {1: NORM, 3: NORM}, f"{NORM} on ranks 1, 3",
                 marks=pytest.mark.slow),
    pytest.param(Case(pp=2, schedule="1F1B", dp=2, mtp=1, microbatches=2), Precision(torch.float64),
                 {2: "model.embed_tokens.weight"}, "model.embed_tokens.weight on ranks 2, 3",  # both gather that shard
                 marks=pytest.mark.slow),
])
def test_a_planted_difference_is_named_on_all_ranks(ranks, case, precision, plants, named):
    """And the norm of all weights, and the zeros of the gradient, are those of the parameters, whole and once each."""
    records = ranks.run(case.layout.world_size, compare, case, precision, plants)
    whole = {name: both for (_, _, here), _ in records for name, both in here.items()}
    squares, zeros = map(sum, zip(*whole.values()))
    assert zeros > 0
    for (norm, counted, _), (before, after) in records:
        assert norm == pytest.approx(squares**0.5, rel=1e-6) and counted == zeros
        assert before is None
        assert f"after iteration 3 not all ranks have the same weights: {named}. The last" in after


def differs_when_gathered() -> str:
    """Data rank 1 gets one number of a weight wrong from the others."""
    case = Case(dp=2)
    trainer = Trainer(spec_of(case, Precision(torch.float32)), build_meshes(case.layout, torch.device("cpu")))
    gathered, wronged = replicas.gathered_parameters, trainer.stages[0].get_parameter(NORM)

    def wrong(unit):
        for shard, weight in gathered(unit):
            if dist.get_rank() == 1 and shard is wronged:
                weight = weight.detach().clone()
                weight[0] += 1.0
            yield shard, weight

    try:
        replicas.gathered_parameters = wrong
        check_replicas(trainer.stages, 1)
    except ReplicasDiffer as error:
        return str(error)
    finally:
        replicas.gathered_parameters = gathered


def test_what_a_rank_gathers_is_compared_not_its_shards(ranks):
    assert all(f"{NORM} on rank 1." in told for told in ranks.run(2, differs_when_gathered))


def test_the_minority_is_named_and_a_long_list_is_cut():
    same = {("a", (0,)): 1, ("a", (4,)): 2}
    assert describe_differences([same, same, {}]) is None
    assert describe_differences([same, same, {("a", (4,)): 3}]) == "a on rank 2"
    assert describe_differences([{("a", ()): 1}, {("a", ()): 2}]) == "a on rank 1"
    many = [{(f"p{number}", ()): rank for number in range(10)} for rank in range(2)]
    assert describe_differences(many) == ", ".join(f"p{number} on rank 1" for number in range(8)) + " and 2 more"
