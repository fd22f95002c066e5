"""Ranks that answer together against one process: tokens alike, and log-probabilities to rounding, in float64."""

import re
from functools import cache

import pytest
from answers_job import aborted, answers, unseeded, write_adapter, write_model

from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.parallel.layout import Layout

PROMPTS = [[3, 14, 15, 9, 26], [5, 35, 8], [9, 7, 9, 3, 23, 8, 46, 26, 4], [33]]
PARAMETERS = [SamplingParameters(max_tokens=8, temperature=0, logprobs=2, prompt_logprobs=0),
              SamplingParameters(max_tokens=5, temperature=1.3, seed=11, n=2, logprobs=0),
              SamplingParameters(max_tokens=12, temperature=0.7, top_p=0.9, seed=12, logprobs=1, chosen_experts=True),
              SamplingParameters(max_tokens=3, top_k=5, seed=13, ignore_eos=True)]
# The second job has one request for two or four replicas: the others have nothing to do, and take part.
JOBS = [(PROMPTS, PARAMETERS), (PROMPTS[2:3], PARAMETERS[2:3])]
BESIDE = " and an adapter"  # of a form: of all layers
CASES = [("tp2", 0, "fp8"), ("dp2 ep2", 2, "plain" + BESIDE)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in (
    ("tp2", 2, "plain"), ("tp2", 0, "nf4"), ("dp2 tp2 ep4", 2, "plain"), ("dp2 tp2 ep4", 0, "plain"),
    ("dp2 tp2 ep2", 0, "nf4" + BESIDE), ("dp4 ep2", 0, "fp8"), ("dp2 ep2", 2, "plain"),
    ("tp2", 0, "plain" + BESIDE))]


def layout_of(text: str) -> Layout:
    return Layout(**{axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d)", text)})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("answers") / "model")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("answers") / "adapter")


@pytest.fixture(scope="module")
def ask(ranks, directory, adapter):
    """What ranks of a layout answer, on each rank."""
    def found(layout: Layout, drafts: int, form: str):
        beside = adapter if form.endswith(BESIDE) else None
        return ranks.run(layout.world_size, answers, directory, layout, JOBS, drafts, form.removesuffix(BESIDE), beside)

    return found


@pytest.fixture(scope="module")
def alone(ask):
    """What one process answers, computed once for each kind of model."""
    return cache(lambda drafts, form: ask(Layout(), drafts, form)[0])


@pytest.mark.parametrize("layout, drafts, form", CASES)
def test_answers_are_those_of_one_process(ask, alone, layout, drafts, form):
    """Sums of float64 in another order move a log-probability by 1e-13 or so; a mistake moves it by 1e-3."""
    found, *others = ask(layout_of(layout), drafts, form)
    assert not any(others)
    for ours, theirs in zip(found, alone(drafts, form), strict=True):
        for of_prompt, expected in zip(ours, theirs, strict=True):
            assert len(of_prompt) == len(expected)
            for one, other in zip(of_prompt, expected):
                assert (one.tokens, one.prompt, one.finish_reason) == (other.tokens, other.prompt, other.finish_reason)
                if one.log_probabilities is not None:
                    assert one.log_probabilities == pytest.approx(other.log_probabilities, rel=1e-9)
                if one.prompt_log_probabilities is not None:
                    expected_of_prompt = pytest.approx(other.prompt_log_probabilities[1:], rel=1e-9)
                    assert one.prompt_log_probabilities[1:] == expected_of_prompt
                if one.chosen_experts is not None:
                    for name, experts in other.chosen_experts.items():
                        assert one.chosen_experts[name].sort(-1).values.tolist() == experts.sort(-1).values.tolist()


@pytest.mark.slow
def test_drafts_change_no_answer(alone):
    plain, drafted = alone(0, "plain"), alone(2, "plain")
    assert [[[one.tokens for one in each] for each in job] for job in plain] == [
        [[one.tokens for one in each] for each in job] for job in drafted]
    assert {one.finish_reason for each in plain[0] for one in each} == {"stop", "length"}


def test_an_aborted_request_frees_its_blocks_on_its_rank(ranks, directory):
    layout = Layout(dp=2, ep=2)
    (finished, used), (_, other) = ranks.run(layout.world_size, aborted, directory, layout)
    assert finished == ["first", "third"] and used == other == 0


@pytest.mark.slow
def test_ranks_draw_alike_without_a_seed(ranks, directory):
    """Else each would go on with its own tokens, and what its heads add would be of another text."""
    (written, read), _ = ranks.run(2, unseeded, directory, Layout(tp=2))
    assert len(written) == 12 and written == pytest.approx(read, rel=1e-9)
