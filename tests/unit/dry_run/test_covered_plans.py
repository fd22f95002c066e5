"""Plans against dry runs over the covering array, with layers as wide as V3's. First all weights are trained: within
3 %, and those of CLOSE, of which every tensor is planned, within 0.2 %. Then those that have adapters or frozen weights
are taken as they are: within 3 % but for COARSER_AS_THEY_ARE, and these within 8 %.
"""

from dataclasses import replace

import pytest
from cases import WIDE_CASES, covering_cases
from command_lines import settings_of as settings_of_case

from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.rank import batch_of, dry_rank
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.positions import TOKEN_KEYS
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import all_ranks, worst
from megatron_deepseek.planning.state_bytes import gathered_weights
from megatron_deepseek.settings import Settings

LENGTH, CHUNK = 4096, 1536
QUICK = (0, 19, 21, 30, 41, 55)  # in `make test`: by the layer, one micro-batch, weight gradients apart, pairs that
#                                  take turns, experts that run again, one micro-batch by the layer
CLOSE = (4, 19, 35, 70)
COARSER_AS_THEY_ARE = (10, 30)
QUICK_AS_THEY_ARE = (8, 12, 16, 23, 35, 70)  # adapters, all of a stage gathered ahead, weights for the step, attention
#                                               by blocks in a forward, frozen experts, one trained weight
CASES = (*covering_cases(), *WIDE_CASES)
OTHERS = [each for each in range(len(CASES)) if each not in QUICK]


def wide(model: ModelConfig) -> ModelConfig:
    """Return a model of as many layers of the same kinds, of V3's widths."""
    widths = dict(vocab_size=32768, hidden_size=7168, intermediate_size=18432)
    if model.grouped_query:
        widths |= dict(head_dim=128, num_attention_heads=64,
                       num_key_value_heads=8 if model.num_key_value_heads > 1 else 1)
    else:
        widths |= dict(num_attention_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                       v_head_dim=128, q_lora_rank=1536 if model.q_lora_rank else None)
    if model.n_routed_experts:
        widths |= dict(moe_intermediate_size=2048, n_routed_experts=32, num_experts_per_tok=4)
    return replace(model, **widths, **(dict(sliding_window=1024) if model.sliding_window else {}))


def settings_of(number: int, as_it_is: bool = False) -> Settings:
    """Return the settings of a case in bfloat16, without adapters and frozen weights unless it is to be `as_it_is`."""
    case = CASES[number] if as_it_is else replace(CASES[number], lora="none", frozen=0, trained="")
    settings = settings_of_case(case, "--bf16")
    loss = replace(settings.loss, loss_chunk_size=CHUNK if settings.loss.loss_chunk_size else None)
    return replace(settings, model=wide(settings.model), data=replace(settings.data, seq_length=LENGTH), loss=loss)


def assert_as_planned(settings: Settings, within: float) -> None:
    """Compare the peak of the rank that is planned to be the fullest."""
    layout, job = settings.layout, Job(settings, frozen_base=settings.lora is not None)
    rank = worst(all_ranks(job)).pp_rank * layout.world_size // layout.pp
    found = dry_rank(DryRun(True, False, layout.world_size), settings, rank)
    assert found.planned.peak_bytes == pytest.approx(found.timeline.peak.bytes, rel=within)


@pytest.mark.parametrize("number", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
def test_the_fullest_rank_takes_what_is_planned(number):
    assert_as_planned(settings_of(number), 0.002 if number in CLOSE else 0.03)


@pytest.mark.parametrize("number", [
    pytest.param(each, marks=() if each in QUICK_AS_THEY_ARE else pytest.mark.slow) for each, case in enumerate(CASES)
    if case.lora != "none" or case.frozen or case.trained])
def test_with_adapters_and_frozen_weights(number):
    assert_as_planned(settings_of(number, as_it_is=True), 0.08 if number in COARSER_AS_THEY_ARE else 0.03)


def test_adapters_drop_features_in_a_dry_run_too():
    """Without keys of its tokens a batch loses nothing (training/token_keys.py)."""
    settings = settings_of(9, as_it_is=True)
    assert set(batch_of(settings).per_token) == {TOKEN_KEYS}
    assert not batch_of(replace(settings, lora=replace(settings.lora, lora_dropout=0.0))).per_token


def test_a_routers_adapter_is_gathered_in_float32():
    """With all else that is gathered for the step: to the byte."""
    settings = settings_of(34, as_it_is=True)
    layout, job = settings.layout, Job(settings, frozen_base=True)
    found = dry_rank(DryRun(True, False, layout.world_size, micro_batches=1), settings, 0)
    assert max(level.categories["gathered weights"] for level in found.timeline.levels) == gathered_weights(
        job, [job.stages[stage] for stage in job.held(0)]).all
