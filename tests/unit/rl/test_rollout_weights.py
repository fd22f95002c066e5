"""The engine's layout, and on one process what its weights are: adapters beside bases of bytes, and bfloat16."""

from dataclasses import replace

import pytest
import torch
from base_job import BaseCase
from cases import Case
from job import open_adapters, spec_of
from random_base import RandomBase
from rollout_job import ENDS, LENGTH, PROMPTS, score, trainer_of

from megatron_deepseek.checkpoint.job.base_weights import fill_held
from megatron_deepseek.model.architecture.base_weights import BaseSettings
from megatron_deepseek.model.build import Precision
from megatron_deepseek.model.router import Router
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.tensor import ParallelLinear
from megatron_deepseek.rl.rollout import gathering
from megatron_deepseek.rl.rollout.engine import RolloutEngine, seed_of
from megatron_deepseek.rl.rollout.layout import check_base, engine_layout
from megatron_deepseek.rl_settings import RolloutSettings
from megatron_deepseek.training.trainer import Trainer

SETTINGS = RolloutSettings(group_size=2, max_tokens=5)


@pytest.mark.parametrize("training, asked, layout", [
    (Layout(pp=2, tp=2, cp=2, etp=2, ep=2), {}, Layout(dp=4, tp=2, ep=2)),
    (Layout(pp=4, dp=2), dict(tp=4, ep=8), Layout(dp=2, tp=4, ep=8)),
    (Layout(tp=4, ep=4, sequence_parallel=True), dict(tp=1), Layout(dp=4, ep=4)),
])
def test_the_engine_has_all_ranks(training, asked, layout):
    assert engine_layout(Case(shared=2).model, training, RolloutSettings(**asked)) == layout


@pytest.mark.parametrize("asked, message", [
    (dict(tp=3), "--rollout-tensor-parallel-size 3 does not divide the number of ranks 8"),
    (dict(ep=3), "--rollout-expert-parallel-size 3 does not divide the number of ranks 8"),
    (dict(tp=8), "--rollout-tensor-parallel-size 8 does not divide --num-attention-heads 4"),
])
def test_sizes_that_do_not_divide_are_refused(asked, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        engine_layout(Case().model, Layout(dp=8), RolloutSettings(**asked))


def test_bytes_that_would_be_divided_otherwise_are_refused():
    """Scales of scales are of a rank's own columns."""
    model = BaseCase().model
    check_base(model, BaseSettings(4), Layout(tp=2), Layout(tp=2))
    check_base(model, BaseSettings(4, double_quantization=False), Layout(tp=2), Layout(dp=2))
    with pytest.raises(ValueError, match="--rollout-tensor-parallel-size 1: with --quantization-bit 4 the scales of "):
        check_base(model, BaseSettings(4), Layout(tp=2), Layout(dp=2))


def test_replicas_that_share_experts_step_together():
    assert [Layout(dp=4, tp=2, ep=ep).shares_experts for ep in (1, 2, 4)] == [False, False, True]
    assert Layout(dp=2, tp=3, ep=2).shares_experts


def check_samples(trainer: Trainer, tolerance: float) -> RolloutEngine:
    engine = RolloutEngine(trainer, SETTINGS, None, ENDS, LENGTH)
    engine.refresh()
    groups = engine.generate(PROMPTS, [seed_of(3, 1, number) for number in range(len(PROMPTS))], SETTINGS, 1.0)
    for group, expected in zip(groups, score(trainer, groups), strict=True):
        for sample, values in zip(group, expected, strict=True):
            assert sample.log_probabilities == pytest.approx(values, rel=tolerance, abs=tolerance)
    return engine


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_of_bytes_answers_as_it_trains(meshes, bits):
    case = BaseCase(bits=bits)
    spec = spec_of(case, Precision(torch.float64), LENGTH)
    trainer = Trainer(replace(spec, build=replace(spec.build, base=case.base)), meshes)
    open_adapters(trainer)
    fill_held(trainer.stages, RandomBase(case.model, 0.1), meshes.device)
    check_samples(trainer, 1e-9)


def test_in_bfloat16_weights_are_those_of_the_forward_and_routers_keep_theirs(meshes):
    trainer = trainer_of(Case(), Precision(torch.float32, torch.bfloat16))
    engine = check_samples(trainer, 0.05)
    trained = {name: parameter.full_tensor() for name, parameter in trainer.stages[0].named_parameters()}
    stage = engine.weights.load()
    seen = {}
    for name, module in stage.named_modules():
        if isinstance(module, Router):
            assert torch.equal(module.weight, trained[f"{name}.weight"]) and module.weight.dtype == torch.float32
        elif isinstance(module, ParallelLinear):
            seen[name] = module.weight
            held = module.weight if isinstance(module.weight, torch.Tensor) else module.weight.dense(torch.bfloat16)
            assert torch.equal(held, trained[f"{name}.weight"].bfloat16()), name
    assert len(seen) > 10


def test_seeds_are_of_one_prompt_of_one_rollout():
    seeds = {seed_of(*numbers) for numbers in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (1, 10, 1), (1, 1, 1))}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_samples_bring_what_training_is_to_keep(meshes, monkeypatch):
    """Experts of each token that went through the model, and ids that each token was drawn among, with p among these.
    They are gathered a few samples at a time.
    """
    monkeypatch.setattr(gathering, "SAMPLES_AT_A_TIME", 4)
    settings = replace(SETTINGS, keep_routing=True, keep_sampling_mask=True, top_k=5)
    engine = RolloutEngine(trainer_of(Case()), settings, None, ENDS, LENGTH)
    engine.refresh()
    groups = engine.generate(PROMPTS, range(len(PROMPTS)), settings, 0.7)
    assert [[sample.group for sample in group] for group in groups] == [[number] * 2 for number in range(len(PROMPTS))]
    for sample in (sample for group in groups for sample in group):
        assert {name: tuple(experts.shape) for name, experts in sample.experts.items()} == {
            "model.layers.1.mlp": (len(sample.prompt) + len(sample.tokens) - 1, 2)}
        assert len(sample.tokens) == len(sample.kept_ids) == len(sample.log_probabilities)
        for token, ids, value in zip(sample.tokens, sample.kept_ids, sample.log_probabilities):
            assert token in ids.tolist() and len(ids) == 5 and -20 < value < 0
    assert len({tuple(ids.tolist()) for group in groups for sample in group for ids in sample.kept_ids}) > 5
