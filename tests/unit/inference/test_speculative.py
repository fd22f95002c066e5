"""Speculation: text with drafts is text without them, greedy and sampled, and drafts are accepted as often as they are
likely.
"""

from dataclasses import replace

import pytest
import torch
from small_engines import V3_MTP, engine, loaded, uncached_states
from small_models import tensors

from megatron_deepseek.data.tokenizer import ByteTokenizer
from megatron_deepseek.inference.sampling_parameters import SamplingParameters

PROMPTS = [[5, 9, 3, 3, 1, 40, 22, 7, 9], [11], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]]


@torch.no_grad()
def bigram_model(meshes, depths: int = 1, noise: float = 0.0, **more):
    """A model in which the next token depends on the last one alone, and whose modules say the same but for `noise`.

    All that layers add is zero, and modules join nothing of the state: then theirs is the embedding of the last token,
    normed twice with weights of one, as the main model's is.
    """
    config = replace(V3_MTP, num_nextn_predict_layers=depths, **more.pop("fields", {}))
    model = loaded(config, meshes, **more)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors(model.stage).items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            tensor.zero_()
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        if name.endswith("eh_proj.weight"):
            tensor.zero_()
            tensor[:, :config.hidden_size] = torch.eye(config.hidden_size)
            tensor += noise * torch.randn(tensor.shape, generator=generator)
    return model


def answers(model, parameters, **settings):
    one = engine(model, **settings)
    outputs = one.generate(PROMPTS, parameters)
    return [[(answer.tokens, answer.finish_reason, answer.text) for answer in each] for each in outputs], one.statistics


WISHES = {
    "greedy": SamplingParameters(temperature=0, max_tokens=15),
    "sampled": SamplingParameters(temperature=0.7, seed=3, max_tokens=15),
    "n": SamplingParameters(temperature=1.2, top_p=0.9, seed=4, max_tokens=10, n=3),
    "penalties": SamplingParameters(temperature=0, max_tokens=15, repetition_penalty=1.3, frequency_penalty=0.5),
    "ends": SamplingParameters(temperature=0.9, seed=1, max_tokens=30, min_tokens=3, stop_token_ids=(7, 9, 30)),
}


@pytest.mark.parametrize("depths, draft_tokens, noise", [(1, 1, 0.2), (1, 4, 0.0), (2, 1, 0.2), (2, 5, 0.2)])
def test_text_with_drafts_is_text_without(meshes, depths, draft_tokens, noise):
    model = bigram_model(meshes, depths, noise)
    for name, parameters in WISHES.items():
        plain, _ = answers(model, parameters)
        drafted, statistics = answers(model, parameters, draft_tokens=draft_tokens, token_budget=16)
        assert drafted == plain, name
        accepted, proposed = statistics.drafts_accepted, statistics.drafts_proposed
        assert len(proposed) == draft_tokens and 0 < accepted[0] <= proposed[0]
        if name == "greedy":  # a module without noise is always right
            assert (accepted == proposed) == (noise == 0)


@pytest.mark.parametrize("settings", [{"draft_tokens": 1}, {"draft_tokens": 2, "token_budget": 4},
                                      {"draft_tokens": 2, "num_blocks": 14, "max_length": 40}])
def test_drafts_are_what_the_modules_say_of_the_whole_text(meshes, settings):
    """Whatever has been computed in chunks, shared or computed again: the likeliest token after each depth's state."""
    model = loaded(replace(V3_MTP, num_nextn_predict_layers=2), meshes)
    one, checked = engine(model, **settings), 0
    one.generate([PROMPTS[2]], WISHES["greedy"])  # its blocks are shared by the next ones
    for prompt in (PROMPTS[0], PROMPTS[2], [*PROMPTS[2], 7]):
        one.add(prompt, WISHES["sampled"])
    while one.has_work:
        one.step()
        for sequence in one.scheduler.running:
            states = uncached_states(model.stage, [*sequence.tokens, *sequence.drafts])
            for depth, draft in enumerate(sequence.drafts, 1):
                state = states[depth][len(sequence.tokens) - 2]  # the last token whose next one is known
                assert int(model.stage.logits(state.view(1, 1, -1)).argmax()) == draft
                checked += 1
    assert checked > 30 and one.statistics.shared_tokens > 0
    assert (one.statistics.preemptions > 0) == ("num_blocks" in settings)


@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_drafts_of_a_model_of_random_weights_change_nothing(meshes, draft_tokens):
    model = loaded(replace(V3_MTP, num_nextn_predict_layers=2), meshes)
    for parameters in (WISHES["greedy"], WISHES["sampled"]):
        assert answers(model, parameters, draft_tokens=draft_tokens, num_blocks=30)[0] == answers(model, parameters)[0]


def test_right_drafts_save_forwards(meshes):
    one = engine(bigram_model(meshes), draft_tokens=3)
    one.add(PROMPTS[0], SamplingParameters(temperature=0, max_tokens=13))
    steps = 0
    while one.has_work:
        one.step()
        steps += 1
    assert steps == 1 + 3  # the prompt gives one token, and each step four


def test_stop_strings_end_in_the_middle_of_drafts(meshes):
    model = bigram_model(meshes, fields={"vocab_size": 260}, tokenizer=ByteTokenizer())
    parameters = SamplingParameters(temperature=0, max_tokens=30, ignore_eos=True)
    (plain,), = engine(model).generate(["abc"], parameters)
    for size in range(1, 7):
        stopping = replace(parameters, stop=plain.text[4:4 + size])
        ((with_drafts,),), ((without,),) = (engine(model, draft_tokens=drafts).generate(["abc"], stopping)
                                            for drafts in (5, 0))
        assert with_drafts == replace(without, request_id=with_drafts.request_id)


def test_drafts_are_accepted_as_often_as_they_are_likely(meshes):
    """A draft is the likeliest token x, accepted with its probability, and tokens are distributed as without drafts.

    Many requests that differ in their seeds. The second token is the first one that a draft stands for: counts of it
    after each first token, against its probabilities. Chi-square: with 25 degrees of freedom 66 is exceeded once in
    100,000 times; the seeds are fixed.
    """
    model, number = bigram_model(meshes), 1500
    one = engine(model, draft_tokens=1, max_running=250, token_budget=2000, max_length=8)
    wishes = SamplingParameters(temperature=1.3, max_tokens=3, top_k=6)
    outputs = one.generate([[5]] * number, [replace(wishes, seed=seed) for seed in range(number)])
    with torch.no_grad():
        trunk = model.stage.model
        logits = model.stage.logits(trunk.norm(trunk.embed_tokens(torch.arange(48).unsqueeze(0))))[0] / 1.3
    values, ids = logits.topk(6)
    probabilities = torch.zeros(48, 48).scatter(1, ids, values.softmax(-1))
    pairs = torch.zeros(48, 48)
    for (output,) in outputs:
        pairs[output.tokens[0], output.tokens[1]] += 1
    expected = pairs.sum(1, keepdim=True) * probabilities
    assert not pairs[expected == 0].any()
    enough = expected > 5  # below that the statistic is not distributed as chi-square
    assert 20 < enough.sum() < 32
    assert ((pairs - expected).square() / expected)[enough].sum() < 66
    accepted, proposed = one.statistics.drafts_accepted[0], one.statistics.drafts_proposed[0]
    likely = (pairs.sum(1) * probabilities.max(1).values).sum() / number
    assert proposed == number and abs(accepted / proposed - likely) < 4 * (0.25 / number)**0.5  # standard errors
