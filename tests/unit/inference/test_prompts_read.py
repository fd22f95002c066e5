"""Prompts that are only read: their log-probabilities from a place on, what they share, and where they end."""

import pytest
import torch
from small_engines import V3_MTP, engine, loaded, uncached_logits

from megatron_deepseek.inference.sampling_parameters import SamplingParameters

CONTEXT, TEXTS = [5, 9, 2, 33, 14, 7, 21, 8, 3], ([4, 17, 30], [4, 17, 11, 6], [12])


def reading(context: list[int]) -> SamplingParameters:
    return SamplingParameters(max_tokens=0, prompt_logprobs=1, prompt_logprobs_from=len(context))


@pytest.fixture(scope="module")
def model(meshes):
    return loaded(V3_MTP, meshes, torch.float64)


@pytest.mark.parametrize("settings", [{}, {"block_size": 1}, {"token_budget": 3}, {"num_blocks": 25, "max_running": 3},
                                      {"prefix_sharing": False}, {"draft_tokens": 1}])
def test_what_is_read_is_what_the_training_model_says(model, settings):
    one = engine(model, **settings)
    outputs = one.generate([[*CONTEXT, *text] for text in TEXTS], reading(CONTEXT))
    for (output,), text in zip(outputs, TEXTS, strict=True):
        expected = uncached_logits(model.stage, [*CONTEXT, *text])[len(CONTEXT) - 1:-1].log_softmax(-1)
        assert output.prompt_log_probabilities[:len(CONTEXT)] == [None] * len(CONTEXT)
        found = output.prompt_log_probabilities[len(CONTEXT):]
        assert found == pytest.approx(expected.gather(1, torch.tensor(text)[:, None])[:, 0].tolist(), abs=1e-9)
        tops = [max(top, key=top.get) for top in output.prompt_top_log_probabilities[len(CONTEXT):]]
        assert tops == expected.argmax(-1).tolist()
        assert (output.tokens, output.finish_reason) == ([], "length")
    assert not one.has_work and one.statistics.blocks_used == 0 and one.statistics.output_tokens == 0


@pytest.mark.parametrize("block_size, shared", [(1, 2 * 8), (3, 2 * 6), (16, 0)])
def test_the_choices_of_a_question_compute_its_context_once(model, block_size, shared):
    """Asked at once: the others wait for the first one's full blocks. A context's last token is computed for each,
    since its logits are read.
    """
    one = engine(model, block_size=block_size)
    one.generate([[*CONTEXT, *text] for text in TEXTS], reading(CONTEXT))
    assert one.statistics.shared_tokens == shared


def test_a_text_may_end_behind_the_last_place(model):
    """As many tokens as the model sees, and one whose log-probability is read after them."""
    one, prompt = engine(model, max_length=8), [3, 1, 4, 1, 5, 9, 2, 6, 5]
    (output,), = one.generate([prompt], reading(prompt[:4]))
    expected = uncached_logits(model.stage, prompt)[7].log_softmax(-1)[5]
    assert output.prompt_log_probabilities[-1] == pytest.approx(float(expected), abs=1e-9)
    for wrong, parameters in (([*prompt, 3], reading(prompt)), (prompt[:8], SamplingParameters())):
        with pytest.raises(ValueError, match="max_length 8 must leave room"):
            one.add(wrong, parameters)


def test_nothing_is_answered_only_where_something_is_read(model):
    with pytest.raises(ValueError, match="max_tokens is 0; it must be at least 1, unless prompt_logprobs"):
        SamplingParameters(max_tokens=0)
    (output,), = engine(model).generate([[7]], reading([7]))
    assert output.prompt_log_probabilities == [None] and output.finish_reason == "length"


def test_requests_wait_for_a_block_that_another_computes(model):
    """Three requests with the same first 40 tokens, in steps of 16 tokens: the beginning is computed once, and who
    shares nothing does not wait.
    """
    common = torch.randint(V3_MTP.vocab_size, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    one = engine(model, token_budget=16)
    parameters = SamplingParameters(max_tokens=2, temperature=0)
    outputs = one.generate([[*common, 1], [*common, 2], [*common, 3], [9, 9]], parameters)
    assert one.statistics.shared_tokens == 2 * 40
    alone = [engine(model, prefix_sharing=False).generate([[*common, last]], parameters)[0] for last in (1, 2, 3)]
    assert [each.tokens for (each,) in outputs[:3]] == [each.tokens for (each,) in alone]
