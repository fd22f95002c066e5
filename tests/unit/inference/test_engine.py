"""The engine: many requests give what each gives alone, whatever the scheduler does with them."""

from dataclasses import replace

import pytest
import torch
from small_engines import V2_LITE, V3_MTP, engine, loaded, spread_weights, uncached_logits
from small_models import relative_error, tensors, training_batch, whole_stage
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

from megatron_deepseek.data.tokenizer import ByteTokenizer
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.settings import OptimizerSettings
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

GREEDY = SamplingParameters(temperature=0, max_tokens=12)
SAMPLED = SamplingParameters(temperature=1.5, max_tokens=12, seed=7, logprobs=2, prompt_logprobs=1)
BYTES = replace(V3_MTP, vocab_size=260)  # a ByteTokenizer's


def prompts(number: int = 5, config=V3_MTP) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [9, 1, 17, 4, 23, 8, 12, 5][:number]
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[each.tokens for each in answers] for answers in outputs]


def greedy(stage, prompt: list[int], number: int) -> list[int]:
    """The likeliest tokens, by the training model's forward of the whole sequence each time."""
    tokens = list(prompt)
    for _ in range(number):
        tokens.append(int(uncached_logits(stage, tokens)[-1].argmax()))
    return tokens[len(prompt):]


@pytest.fixture(scope="module")
def model(meshes):
    return loaded(V3_MTP, meshes)


def test_greedy_text_is_that_of_the_training_model(model):
    outputs = engine(model).generate(prompts(), GREEDY)
    assert tokens_of(outputs) == [[greedy(model.stage, prompt, 12)] for prompt in prompts()]
    assert {answers[0].finish_reason for answers in outputs} == {"length"} and outputs[0][0].text is None


COMMON = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
          "max_position_embeddings": 100}
THEIRS = {
    "deepseek_v3": (DeepseekV3Config, COMMON | {
        "moe_intermediate_size": 12, "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 10,
        "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 12,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True}),
    "qwen3": (Qwen3Config, COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})}


@pytest.mark.parametrize("family", THEIRS)
def test_greedy_text_is_that_of_transformers(meshes, family):
    kind, fields = THEIRS[family]
    reference = AutoModelForCausalLM.from_config(kind(**fields)).eval()
    spread_weights(reference)
    config = type(V3_MTP).from_hf_dict(reference.config.to_dict() | {"num_nextn_predict_layers": 0})
    ours = loaded(config, meshes)
    assert all(tensor.equal(tensors(reference)[name]) for name, tensor in tensors(ours.stage).items())
    given = prompts(3, config)
    expected = [reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=0,
                                   eos_token_id=None)[0, len(prompt):].tolist() for prompt in given]
    assert tokens_of(engine(ours).generate(given, replace(GREEDY, max_tokens=24))) == [[each] for each in expected]


@pytest.mark.parametrize("settings", [
    {}, {"token_budget": 1}, {"token_budget": 7}, {"block_size": 16}, {"max_running": 2}, {"prefix_sharing": False},
    {"num_blocks": 25}, {"num_blocks": 26, "draft_tokens": 3}, {"draft_tokens": 1, "token_budget": 5}])
def test_alone_or_with_others_the_tokens_are_the_same(model, settings):
    """In float32 a sum may round otherwise among others, which does not change a choice that is no tie."""
    given = [replace(SAMPLED, seed=7 + i, temperature=(0, 1.5)[i % 2]) for i in range(5)]
    alone = [engine(model).generate([prompt], each)[0][0] for prompt, each in zip(prompts(), given)]
    together = engine(model, **settings)
    for expected, (got,) in zip(alone, together.generate(prompts(), given)):
        assert got.tokens == expected.tokens
        assert got.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-5)
        assert got.prompt_log_probabilities[1:] == pytest.approx(expected.prompt_log_probabilities[1:], abs=1e-5)
    assert together.statistics.blocks_used == 0 and not together.has_work
    assert (together.statistics.preemptions > 0) == ("num_blocks" in settings)


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_log_probabilities_and_experts_are_those_of_scoring(meshes, model, draft_tokens):
    """Those of training's losses, to the rounding of float32; the trainer is given the same weights."""
    config = replace(V3_MTP, num_nextn_predict_layers=0)
    wishes = SamplingParameters(max_tokens=12, seed=3, logprobs=0, prompt_logprobs=0, chosen_experts=True)
    (output,), = engine(model, token_budget=5, draft_tokens=draft_tokens).generate(prompts(1), wishes)
    tokens = [*output.prompt, *output.tokens]
    spec = TrainingSpec(config, (whole_stage(config),), "1F1B", len(tokens) - 1, 1,
                        BuildOptions(precision=Precision(torch.float32)), OptimizerSettings())
    trainer = Trainer(spec, meshes)
    spread_weights(trainer.stages[0])
    ids = torch.tensor([tokens])
    scores = trainer.score(training_batch(ids[:, :-1], ids[:, 1:], torch.ones(1, len(tokens) - 1)), experts=True)
    found = torch.tensor(output.prompt_log_probabilities[1:] + output.log_probabilities)
    torch.testing.assert_close(found, scores.log_probabilities_BS[0].detach(), rtol=0, atol=1e-5)
    assert output.chosen_experts.keys() == scores.experts.keys() and scores.experts
    for name, experts_1SK in scores.experts.items():
        assert output.chosen_experts[name].sort(-1).values.equal(experts_1SK[0].sort(-1).values)


def test_the_likeliest_tokens_are_listed_beside_the_chosen_one(model):
    (output,), = engine(model).generate(prompts(1), replace(SAMPLED, temperature=3.0))
    logits = uncached_logits(model.stage, [*output.prompt, *output.tokens]).log_softmax(-1)
    for place, (token, top) in enumerate(zip(output.tokens, output.top_log_probabilities), len(output.prompt) - 1):
        best = logits[place].topk(2).indices.tolist()
        assert top == pytest.approx({each: float(logits[place, each]) for each in {token, *best}}, abs=1e-5)
    assert output.prompt_log_probabilities[0] is output.prompt_top_log_probabilities[0] is None
    for place, top in enumerate(output.prompt_top_log_probabilities[1:]):
        assert set(top) == {output.prompt[place + 1], int(logits[place].argmax())}


def test_a_shared_beginning_is_computed_once(model):
    shared = prompts(5)[4]  # 23 tokens, five full blocks of four
    given = [[*shared, 3], [*shared, 4], shared[:12]]
    expected = tokens_of([engine(model, prefix_sharing=False).generate([each], GREEDY)[0] for each in given])
    one = engine(model, draft_tokens=2)
    assert tokens_of([one.generate([each], GREEDY)[0] for each in given]) == expected
    assert one.statistics.shared_tokens == 20 + 8
    two = engine(model)  # while the first still runs
    two.add(given[0], GREEDY, "first")
    for _ in range(3):
        two.step()
    two.add(given[1], GREEDY, "second")
    used = two.statistics.blocks_used
    two.step()
    assert two.statistics.blocks_used == used + 1  # six blocks, of which five are the first one's
    outputs = {}
    while two.has_work:
        outputs |= {output.request_id: output.tokens for output in two.step()}
    assert [outputs["first"], outputs["second"]] == [expected[0][0], expected[1][0]]


def test_n_answers_share_the_prompt_and_have_a_seed_each(model):
    one = engine(model)
    outputs = one.generate(prompts(3), replace(SAMPLED, n=3, prompt_logprobs=None))
    for prompt, answers in zip(prompts(3), outputs):
        assert [answer.index for answer in answers] == [0, 1, 2]
        for answer in answers:
            (alone,), = engine(model).generate([prompt], replace(SAMPLED, seed=7 + answer.index))
            assert answer.tokens == alone.tokens
    assert len({tuple(answer.tokens) for answer in outputs[0]}) == 3
    assert one.statistics.shared_tokens == 2 * (8 + 0 + 16)
    asked = engine(model).generate(prompts(1), replace(SAMPLED, n=2))[0]
    assert asked[0].prompt_log_probabilities == asked[1].prompt_log_probabilities
    assert len(asked[1].prompt_log_probabilities) == 9


def test_an_aborted_request_frees_its_blocks(model):
    one = engine(model)
    for name, prompt in zip("abc", prompts(3)):
        one.add(prompt, replace(GREEDY, max_tokens=50, n=2), name)
    for _ in range(4):
        one.step()
    held = one.statistics.blocks_used
    aborted = one.abort("c")
    assert [output.finish_reason for output in aborted] == ["abort", "abort"] and aborted[0].tokens
    assert one.abort("c") == one.abort("unknown") == [] and one.statistics.blocks_used < held
    one.abort("a")
    one.abort("b")
    assert one.statistics.blocks_used == 0 and not one.has_work and one.step() == []
    one.add(prompts(1)[0], GREEDY, "a")  # the name is free again


def test_an_interrupted_call_leaves_nothing_behind(model, monkeypatch):
    one, steps = engine(model), iter(range(4))

    def interrupted():
        if next(steps) == 3:
            raise KeyboardInterrupt
        return type(one).step_to_ends(one)

    monkeypatch.setattr(one, "step_to_ends", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.generate(prompts(3), GREEDY)
    monkeypatch.undo()
    assert not one.has_work and one.statistics.blocks_used == 0
    assert tokens_of(one.generate(prompts(1), GREEDY)) == [[greedy(model.stage, prompts(1)[0], 12)]]


def test_answers_are_those_of_the_new_weights(meshes):
    ours = loaded(V3_MTP, meshes)
    one = engine(ours)
    before = tokens_of(one.generate(prompts(5), GREEDY))
    spread_weights(ours.stage, seed=1)
    one.weights_changed()
    after = tokens_of(one.generate(prompts(5), GREEDY))
    assert after == tokens_of(engine(ours).generate(prompts(5), GREEDY)) != before


def test_answers_end_where_they_should(model):
    expected = greedy(model.stage, prompts(1)[0], 12)

    def answer(ends=(), **parameters):
        one = engine(replace(model, eos_ids=ends))
        (output,), = one.generate(prompts(1), replace(GREEDY, **parameters))
        return output.tokens, output.finish_reason, output.stop_reason

    end = expected[5]
    place = expected.index(end)
    assert answer(ends=(end,)) == answer(ends=(end,), stop_token_ids=(end,)) == (expected[:place + 1], "stop", None)
    assert answer(stop_token_ids=(end,)) == (expected[:place + 1], "stop", end)
    assert answer(ends=(end,), stop_token_ids=(end,), ignore_eos=True) == (expected[:place + 1], "stop", end)
    assert answer(ends=(end,), ignore_eos=True) == (expected, "length", None)
    tokens, *_ = answer(ends=(expected[0],), min_tokens=3)
    assert expected[0] not in tokens[:3] and tokens[0] == uncached_logits(
        model.stage, prompts(1)[0])[-1].index_fill(0, torch.tensor(expected[0]), -torch.inf).argmax()
    (output,), = engine(model, max_length=12).generate(prompts(1), GREEDY)
    assert (output.tokens, output.finish_reason) == (expected[:3], "length")


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_stop_strings_end_the_text(meshes, draft_tokens):
    model = loaded(BYTES, meshes, tokenizer=ByteTokenizer())
    sampled = SamplingParameters(max_tokens=40, seed=1, temperature=2.0,
                                 logit_bias={i: 60.0 for i in range(97, 101)})
    (plain,), = engine(model).generate(["once"], sampled)
    assert len(plain.text) == len(plain.tokens) == 40
    stop = plain.text[20:23]
    for strings in ([stop], ["never"] * 3 + [stop] + [f"no {i}" for i in range(5000)]):
        one, seen = engine(model, draft_tokens=draft_tokens), []
        one.add("once", replace(sampled, stop=tuple(strings)))
        while one.has_work:
            seen += one.step()
        end = plain.text.index(stop)
        assert (seen[-1].text, seen[-1].finish_reason, seen[-1].stop_reason) == (plain.text[:end], "stop", stop)
        assert seen[-1].tokens == plain.tokens[:end + 3]
        assert all(seen[-1].text.startswith(output.text) for output in seen)  # nothing shown was taken back


@pytest.mark.parametrize("parameters", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_rows_behind_the_tokenizers_ids_are_never_taken(meshes, parameters):
    """Of an embedding that is padded for its ranks: here the padding's rows would always win."""
    padded = replace(BYTES, vocab_size=384)
    model = loaded(padded, meshes)
    model.stage.lm_head.weight.data[260:] *= 100
    (free,), = engine(model).generate([[1, 2]], parameters)
    (bound,), = engine(replace(model, tokenizer=ByteTokenizer())).generate([[1, 2]], parameters)
    assert min(free.tokens) >= 260 > max(bound.tokens)


@pytest.mark.parametrize("prompt, parameters, message", [
    ([], {}, "a prompt is empty"), ([1] * 100, {}, "a prompt has 100 tokens, and max_length 100"),
    ([1, 48], {}, "a prompt has the token id 48, and the model's vocab_size is 48"),
    ([-1], {}, "a prompt has the token id -1"), ("text", {}, "a prompt is text, and the model was loaded without"),
    ([1, "x"], {}, "a prompt has 'x', which is no token id"),
    ([1], {"logit_bias": {48: 1.0}}, "logit_bias has the token id 48"),
    ([1], {"stop_token_ids": (99,)}, "stop_token_ids has the token id 99"),
    ([1], {"stop": ("a",)}, "stop strings need a tokenizer")])
def test_what_cannot_be_answered_is_refused_in_one_line(model, prompt, parameters, message):
    one = engine(model)
    with pytest.raises(ValueError, match=message) as refused:
        one.generate([[1], prompt], SamplingParameters(**parameters))
    assert "\n" not in str(refused.value) and not one.has_work  # nor does the other prompt wait


def test_engines_that_cannot_be_are_refused(meshes, model):
    with pytest.raises(ValueError, match="max_length 129 is longer than the model's max_position_embeddings 128"):
        engine(model, max_length=129)
    dynamic = replace(V3_MTP, rope_scaling=replace(V3_MTP.rope_scaling, kind="dynamic"))
    with pytest.raises(ValueError, match="rope_scaling dynamic turns all earlier keys anew"):
        engine(loaded(dynamic, meshes), max_length=129)
    with pytest.raises(ValueError, match="cache_bytes 1,000 hold"):
        engine(model, cache_bytes=1000)
    with pytest.raises(ValueError, match="draft_tokens 2 need a Multi-Token Prediction module"):
        engine(loaded(V2_LITE, meshes), draft_tokens=2)
    one = engine(model)
    one.add([1], GREEDY, "a")
    with pytest.raises(ValueError, match="request_id 'a' is in use"):
        one.add([1], GREEDY, "a")


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_stretched_rotary_embeddings_are_right_with_a_cache(meshes, kind):
    config = replace(V3_MTP, rope_scaling=replace(V3_MTP.rope_scaling, kind=kind), num_nextn_predict_layers=0)
    ours = loaded(config, meshes)
    assert tokens_of(engine(ours, token_budget=6).generate(prompts(1), GREEDY)) == [
        [greedy(ours.stage, prompts(1)[0], 12)]]


def test_bfloat16_answers_are_near_those_of_float32(meshes):
    """The log-probabilities of the same tokens: random weights amplify rounding, which here is 8 bits."""
    wide, narrow = (engine(loaded(V3_MTP, meshes, dtype)) for dtype in (torch.float32, torch.bfloat16))
    wishes = SamplingParameters(max_tokens=1, prompt_logprobs=0)
    found = [torch.tensor(one.generate(prompts(5), wishes)[4][0].prompt_log_probabilities[1:])
             for one in (wide, narrow)]
    assert relative_error(found[1], found[0]) < 0.1
