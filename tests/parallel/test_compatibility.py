"""The table of what goes with what: a test compares for each dot, and a validation rule refuses for each letter."""

from itertools import combinations

import pytest
from cases import WIDE_CASES
from command_lines import features_of, settings_of
from test_compiled_layers import CASES as COMPILED_CASES
from test_compiled_layers import OVER_BFLOAT16
from test_fp8_layouts import BF16_TOO, FP8_CASES
from test_layouts import CASES
from test_precision import BFLOAT16_CASES

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.features import ALTERNATIVE, FEATURES, TESTED, cell
from megatron_deepseek.arguments.validation import RULES
from megatron_deepseek.planning.pipeline_balance import resolve

# Every list of cases that some test compares with one process, with the arguments that the test adds to the case's.
COMPARED = [*((case,) for case in (*CASES, *WIDE_CASES)), *((case, "--bf16") for case in BFLOAT16_CASES),
            *((case, "--fp8-format", "e4m3", "--fp8-param-gather") for case in FP8_CASES),
            (BF16_TOO, "--bf16", "--fp8-format", "e4m3", "--fp8-param-gather"),
            *((case, "--compile") for case in COMPILED_CASES),
            (OVER_BFLOAT16, "--compile", "--bf16", "--fp8-format", "e4m3", "--fp8-param-gather")]
BASE = "--model tiny --data-path corpus --train-iters 1 --seq-length 256 --global-batch-size 32"
RANKS = 8

PAIRS = {(one, other): cell(one, other) for one, other in combinations(FEATURES, 2)}
REFUSED = [pair for pair, kind in PAIRS.items() if isinstance(kind, int)]


@pytest.mark.parametrize("compared", COMPARED, ids=lambda compared: " ".join(map(str, compared)))
def test_a_case_is_what_its_command_line_asks_for(compared):
    """So that the features which the arguments' settings show are those that the test ran."""
    case, settings = compared[0], settings_of(*compared)
    assert settings.model == case.model
    assert settings.layout == case.layout
    assert resolve(settings.model, settings.pipeline, case.pp, settings.data.seq_length) == case.stages
    assert case.pp == 1 or settings.pipeline.schedule == case.schedule
    assert settings.recompute == case.recomputation and settings.offload == case.offload
    assert settings.communication.cp_comm_type == case.communication.cp_comm_type
    assert settings.communication.moe_token_dispatcher_type == case.communication.moe_token_dispatcher_type
    assert settings.communication.moe_shared_expert_overlap == case.overlap
    assert settings.communication.overlap_moe_expert_parallel_comm == case.turns
    assert settings.loss.moe_router_force_load_balancing == case.forced
    assert settings.loss.moe_expert_capacity_factor == case.loss.moe_expert_capacity_factor
    assert settings.loss.loss_chunk_size == case.loss.loss_chunk_size
    assert settings.loss.moe_token_drop_policy == case.loss.moe_token_drop_policy
    assert (settings.data.reset_attention_mask, settings.optimizer.exp_avg_dtype) == (case.packed, case.moments)
    assert settings.lora == case.adapters
    assert (settings.batch.micro_batch_size, settings.batch.global_batch_size) == (
        case.micro_batch_size, case.global_batch_size)


def test_every_dot_has_a_test():
    seen = set().union(*({*combinations(sorted(features_of(*compared)), 2)} for compared in COMPARED))
    untested = [f"{one.name} with {other.name}" for (one, other), kind in PAIRS.items()
                if kind == TESTED and tuple(sorted((one.name, other.name))) not in seen]
    assert not untested


def test_no_test_has_what_is_refused_or_excluded():
    names = [{one.name, other.name} for (one, other), kind in PAIRS.items() if kind != TESTED]
    for compared in COMPARED:
        assert not [pair for pair in names if pair <= features_of(*compared)], compared


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_arguments_of_a_feature_switch_it_on(feature):
    assert feature.used(parse([*BASE.split(), *feature.arguments.split()], RANKS))


@pytest.mark.parametrize("one, other", REFUSED, ids=lambda feature: feature.name)
def test_every_letter_is_a_rule(one, other):
    """In one order of the arguments at least: where both give one option, the later one counts."""
    rule, outcomes = RULES[PAIRS[one, other] - 1], []
    for first, second in ((one, other), (other, one)):
        try:
            settings = parse([*BASE.split(), *first.arguments.split(), *second.arguments.split()], RANKS)
            assert not (first.used(settings) and second.used(settings))
        except ValueError as error:
            outcomes.append(str(error))
    beginning = rule.message.split("{")[0]
    assert outcomes and all(beginning in outcome for outcome in outcomes), (rule.name, outcomes)


def test_names_in_the_table():
    names = [feature.name for feature in FEATURES]
    assert len(set(names)) == len(names)
    assert {name for rule in RULES for pair in rule.excludes for name in pair} <= set(names)
    assert {ALTERNATIVE, TESTED} <= set(PAIRS.values())
