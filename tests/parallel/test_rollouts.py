"""Samples of the engine on the ranks of a training job: their log-probabilities are those that training finds for the
same tokens, in any layout of both, and the engine's weights are training's to the bit.
"""

from dataclasses import replace

import pytest
import torch
from cases import Case
from job import FLOAT64
from rollout_job import PROMPTS, Seen, rollouts

from megatron_deepseek.model.build import Precision
from megatron_deepseek.rl_settings import RolloutSettings

SETTINGS = RolloutSettings(group_size=3, max_tokens=7)
CASES = [(Case(pp=2, schedule="1F1B", microbatches=2, mtp=1, tied=True, lora="all+router"), dict(tp=2, ep=2))]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in (
    (Case(pp=2, schedule="DualPipeV", virtual=2, dp=2, ep=2, microbatches=4, mtp=1, tied=True, placement="last"),
     dict(tp=2, ep=4)),
    (Case(tp=2, cp=2, ep=2, etp=2, sp=True, shared=2, lora="all+router"), dict(tp=1, ep=2)),
    (Case(dp=3, tp=2, router="group_limited", ep=2), dict(tp=2)))]
CASES += [pytest.param(*case, marks=pytest.mark.long) for case in (
    (Case(tp=2), {}), (Case(pp=2, schedule="1F1B", microbatches=2, tied=True), {}), (Case(dp=2), {}),
    (Case(dp=2, ep=2), {}), (Case(cp=2), dict(tp=2)),
    (Case(pp=2, schedule="Interleaved1F1B", virtual=2, microbatches=2, mtp=1, tp=2, lora="all+router+mtp"), {}),
    (Case(tp=2, dp=2, router="dense", attention="grouped", offload_optimizer=True), dict(tp=4)),
    (Case(dp=4, ep=4, attention="no_q_lora", router="greedy"), dict(tp=2, ep=1)))]


def check(ranks, case: Case, asked: dict, precision: Precision, tolerance: float) -> list[Seen]:
    seen = ranks.run(case.layout.world_size, rollouts, case, replace(SETTINGS, **asked), precision)
    first = seen[0]
    for each in seen:
        assert (each.layout.tp, each.layout.ep) == (asked.get("tp", case.tp), asked.get("ep", case.ep))
        for groups, others, scores in zip(each.rollouts, first.rollouts, each.scores, strict=True):
            assert [len(group) for group in groups] == [SETTINGS.group_size] * len(PROMPTS)
            for number, (group, expected) in enumerate(zip(groups, scores, strict=True)):
                for sample, values in zip(group, expected, strict=True):
                    assert (sample.group, sample.prompt) == (number, PROMPTS[number])
                    assert sample.finished == (sample.tokens[-1] == 1) and len(sample.tokens) <= SETTINGS.max_tokens
                    assert sample.log_probabilities == pytest.approx(values, rel=tolerance, abs=tolerance)
            assert [[sample.tokens for sample in group] for group in groups] == [
                [sample.tokens for sample in group] for group in others]
    return seen


def tokens(groups) -> list[list[tuple[int, ...]]]:
    return [[sample.tokens for sample in group] for group in groups]


@pytest.mark.parametrize("case, asked", CASES, ids=str)
def test_training_finds_the_log_probabilities_of_the_rollout(ranks, case, asked):
    seen = check(ranks, case, asked, FLOAT64, 1e-9)
    again, other = map(tokens, seen[0].rollouts[1:])
    assert tokens(seen[0].rollouts[0]) == again != other, "the second is the first again, the third of other weights"
    assert len({sample for group in again for sample in group}) > len(PROMPTS), "samples of a group differ"
    trained = {name: weight for each in seen for name, weight in each.trained.items()}
    assert seen[0].weights.keys() == {name for name in trained if f"layers.{case.num_layers}." not in name}
    for each in seen:
        for name, parts in each.weights.items():
            for place, part in parts:
                there = tuple(slice(begin, begin + size) for begin, size in zip(place, part.shape))
                assert torch.equal(part, trained[name][there]), name
        assert not each.written
        assert each.kept[0] > 1e5 and each.kept[1] < 100, each.kept


def test_in_float32_too(ranks):
    """There products are of packed weights. Sums in another order differ by 1e-5 or so, mistakes by 1e-2. All ranks get
    the experts of all samples.
    """
    seen = check(ranks, Case(dp=2, ep=2), dict(keep_routing=True), Precision(torch.float32), 1e-4)
    here, there = ([sample for group in each.rollouts[0] for sample in group] for each in seen)
    for one, other in zip(here, there, strict=True):
        assert one.experts["model.layers.1.mlp"].equal(other.experts["model.layers.1.mlp"])
