"""What a rollout wants to know of its tokens: under which distribution each was drawn, among which ids, and which
experts every token had, whoever computed it.
"""

from dataclasses import replace

import pytest
import torch
from small_engines import V3_MTP as TWO_LAYERS
from small_engines import engine, loaded, spread_weights, uncached_logits
from small_models import training_batch, whole_stage
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.settings import OptimizerSettings
from megatron_deepseek.training.replay import stack_experts
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

WISHES = SamplingParameters(max_tokens=8, temperature=1.3, seed=5, drawn_logprobs=True, kept_ids=True,
                            chosen_experts=True)
PROMPT = [5, 9, 2, 44, 17, 3, 8, 31, 20, 6]
V3_MTP = replace(TWO_LAYERS, num_hidden_layers=3)  # two with experts
TRAINED = replace(V3_MTP, num_nextn_predict_layers=0)
PLACES = 20


@pytest.fixture(scope="module")
def model(meshes):
    return loaded(V3_MTP, meshes, torch.float64)


@pytest.fixture(scope="module")
def trainer(meshes):
    """The same weights in training."""
    spec = TrainingSpec(TRAINED, (whole_stage(TRAINED),), "1F1B", PLACES, 1,
                        BuildOptions(precision=Precision(torch.float64)), OptimizerSettings())
    made = Trainer(spec, meshes)
    spread_weights(made.stages[0])
    return made


def experts_in_training(trainer: Trainer, tokens: list[int]) -> torch.Tensor:
    """[tokens - 1, L, K], each row's in order: those of all but the last token."""
    ids = torch.tensor([tokens[:-1] + [0] * (PLACES - len(tokens) + 1)])  # a causal model does not mind
    scores = trainer.score(training_batch(ids, ids, torch.ones(ids.shape)), experts=True)
    return stack_experts(scores.experts, TRAINED)[0, :len(tokens) - 1].sort(-1).values


def adjusted_log_probabilities(model, output, parameters: SamplingParameters) -> torch.Tensor:
    """[answer, V] by the training model's forward and transformers' processors, -inf for what these cut off."""
    tokens = [*output.prompt, *output.tokens]
    logits = uncached_logits(model.stage, tokens)[len(output.prompt) - 1:-1] / parameters.temperature
    warpers = LogitsProcessorList()
    warpers += [TopKLogitsWarper(parameters.top_k)] if parameters.top_k else []
    warpers += [TopPLogitsWarper(parameters.top_p)] if parameters.top_p < 1 else []
    warpers += [MinPLogitsWarper(parameters.min_p)] if parameters.min_p else []
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits).log_softmax(-1)


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9},
                                     {"top_p": 0.7, "repetition_penalty": 1.0001}],
                         ids=lambda options: " ".join(options) or "all")
def test_log_probabilities_and_kept_ids_are_those_of_the_distribution_drawn_from(model, options):
    """Of several requests in one batch; one with a penalty is drawn by itself. Where nothing is cut off, kept ids are
    none at all.
    """
    parameters = replace(WISHES, **options)
    for (output,) in engine(model).generate([PROMPT, PROMPT[3:], PROMPT[:2]], parameters):
        expected = adjusted_log_probabilities(model, output, parameters)
        chosen = expected.gather(1, torch.tensor(output.tokens).unsqueeze(1)).squeeze(1)
        close = 1e-3 if parameters.penalised else 1e-9
        found = torch.tensor(output.drawn_log_probabilities, dtype=torch.float64)
        torch.testing.assert_close(found, chosen, rtol=0, atol=close)
        for kept, row in zip(output.kept_ids, expected, strict=True):
            left = row.isfinite().nonzero().flatten().tolist()
            assert kept is None if len(left) == len(row) else sorted(kept.tolist()) == left
        assert any(kept is not None for kept in output.kept_ids) == bool(parameters.cuts)
        assert all(kept is None or (kept.dtype == torch.int32 and not kept.is_inference()) for kept in output.kept_ids)


def test_raw_log_probabilities_stay_beside_those_of_the_draw(model):
    (output,), = engine(model).generate([PROMPT], replace(WISHES, logprobs=0, top_k=3))
    raw = uncached_logits(model.stage, [*PROMPT, *output.tokens])[len(PROMPT) - 1:-1].log_softmax(-1)
    wanted = raw.gather(1, torch.tensor(output.tokens).unsqueeze(1)).squeeze(1)
    found = torch.tensor(output.log_probabilities, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert all(drawn > raw for drawn, raw in zip(output.drawn_log_probabilities, output.log_probabilities))


def test_the_likeliest_token_has_its_probability_at_temperature_one(model):
    """Nothing was drawn: the cuts, which do not count either, are not named."""
    wishes = replace(WISHES, temperature=0, top_k=3, logprobs=0)
    (output,), = engine(model).generate([PROMPT], wishes)
    assert output.drawn_log_probabilities == pytest.approx(output.log_probabilities, abs=1e-12)
    assert output.kept_ids == [None] * 8


def test_a_cut_that_leaves_all_ids_names_none(model):
    (output,), = engine(model).generate([PROMPT], replace(WISHES, max_tokens=2, top_k=V3_MTP.vocab_size))
    assert output.kept_ids == [None, None]


def test_what_is_not_asked_for_is_not_there(model):
    (output,), = engine(model).generate([PROMPT], SamplingParameters(max_tokens=3, top_k=3))
    assert output.drawn_log_probabilities is output.kept_ids is output.chosen_experts is None


@pytest.mark.parametrize("settings", [{}, {"token_budget": 3}, {"draft_tokens": 2}, {"num_blocks": 8, "max_length": 24},
                                      {"num_blocks": 9, "max_length": 24, "draft_tokens": 2, "token_budget": 7}],
                         ids=lambda settings: " ".join(settings) or "plain")
def test_experts_are_training_s_token_by_token(model, trainer, settings):
    """Of answers that share their prompt's blocks, whose prompts come in chunks, that are preempted and computed again,
    and with drafts that are wrong. A first request leaves blocks whose experts nobody asked for.
    """
    made = engine(model, **settings)
    made.generate([PROMPT], SamplingParameters(max_tokens=2, seed=1))
    given = [replace(WISHES, n=3), replace(WISHES, n=2, seed=50, max_tokens=10)]
    outputs = made.generate([PROMPT, [*PROMPT[:6], 1, 2]], given)
    assert made.statistics.shared_tokens > 0 and (made.statistics.preemptions > 0) == ("num_blocks" in settings)
    for output in (each for answers in outputs for each in answers):
        wanted = experts_in_training(trainer, [*output.prompt, *output.tokens])
        found = stack_experts(output.chosen_experts, TRAINED)
        assert found.dtype == torch.int16 and not found.is_inference()
        assert torch.equal(found.sort(-1).values, wanted)


def test_an_aborted_answer_has_the_experts_of_what_was_computed(model, trainer):
    made = engine(model)
    made.add(PROMPT, WISHES, "one")
    running = [made.step()[0] for _ in range(3)][-1]
    (output,) = made.abort("one")
    assert running.chosen_experts is None and len(output.tokens) == 3
    found = stack_experts(output.chosen_experts, TRAINED).sort(-1).values
    assert torch.equal(found, experts_in_training(trainer, [*PROMPT, *output.tokens]))
    made.add(PROMPT, WISHES, "two")
    assert made.abort("two")[0].chosen_experts == {}


def test_draws_do_not_depend_on_what_else_is_drawn(model):
    """Rows of one temperature are drawn from at once; with drafts, also those that turn out wrong."""
    given = [replace(WISHES, seed=seed, temperature=temperature, top_p=top_p)
             for seed, (temperature, top_p) in enumerate([(1.3, 1.0), (1.3, 0.8), (0.0, 1.0), (1.3, 1.0), (2.0, 0.8)])]
    alone = [engine(model).generate([PROMPT], each)[0][0] for each in given]
    for settings in ({}, {"draft_tokens": 2}):
        for expected, (found,) in zip(alone, engine(model, **settings).generate([PROMPT] * 5, given)):
            assert found.tokens == expected.tokens
            assert found.drawn_log_probabilities == pytest.approx(expected.drawn_log_probabilities, abs=1e-9)
            assert [None if kept is None else sorted(kept.tolist()) for kept in found.kept_ids] == [
                None if kept is None else sorted(kept.tolist()) for kept in expected.kept_ids]
