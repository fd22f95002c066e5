"""Answers that keep to a grammar: random models' random answers to random schemas, by an independent validator; with
drafts and preemptions; behind reasoning; and what cannot be kept to is refused.
"""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from chat_tokenizers import ALL, write_tokenizer
from small_engines import V3_MTP, engine, loaded

from megatron_deepseek.data.tokenizer import ByteTokenizer, build_tokenizer
from megatron_deepseek.finetuning.templates import END_THINK
from megatron_deepseek.inference.grammar import Grammar
from megatron_deepseek.inference.sampling_parameters import SamplingParameters

LENGTH = 1500
ADDED = (*ALL, "[X]")  # the last one looks like text
SAMPLED = SamplingParameters(temperature=1.0, max_tokens=LENGTH - 20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer("HuggingFaceTokenizer", write_tokenizer(
        Path(tmp_path_factory.mktemp("grammar")), ADDED))


@pytest.fixture(scope="module")
def model(meshes, tokenizer):
    """One whose vocabulary is larger than the tokenizer's, as padded embeddings are."""
    config = replace(V3_MTP, vocab_size=tokenizer.vocab_size + 6, max_position_embeddings=LENGTH)
    return loaded(config, meshes, tokenizer=tokenizer, eos_ids=(tokenizer.eod,))


def definition(**rule) -> str:
    return json.dumps({"grammars": [{"name": "answer", **rule}]})


def of_schema(schema, **more) -> Grammar:
    return Grammar(definition(json_schema=schema | {"x-guidance": {"whitespace_pattern": "[ \\n]{0,2}"}}), **more)


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    """A schema whose instances cannot be long, so that no answer is cut."""
    plain, nested = ["string", "integer", "boolean", "null", "enum", "pattern"], ["object", "array"]
    kind = rng.choice(nested if not depth else plain + nested * (depth < 3))
    if kind == "object":
        names = rng.sample(["a", "b", "city", "n", "北京"], rng.randint(1, 3))
        return {"type": "object", "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": names[:rng.randint(0, len(names))], "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": rng.randint(0, 1),
                "maxItems": rng.randint(1, 3)}
    return {"string": {"type": "string", "maxLength": rng.randint(0, 6)},
            "integer": {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 900)},
            "boolean": {"type": "boolean"}, "null": {"type": "null"}, "enum": {"enum": ["x", "y z", 3, True, None]},
            "pattern": {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]{2}$"}}[kind]


def test_random_answers_are_valid_instances_of_random_schemas(model):
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(50)]
    given = [replace(SAMPLED, grammar=of_schema(schema), seed=number) for number, schema in enumerate(schemas)]
    different = set()
    for schema, (answer,) in zip(schemas, engine(model, max_length=LENGTH).generate([[5, 9, 3]] * 50, given)):
        assert answer.finish_reason == "stop", (schema, answer.text)
        jsonschema.validate(json.loads(answer.text), schema)
        different.add(answer.text)
    assert len(different) > 40


SCHEMA = {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 2, "maxItems": 3}


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_drafts_and_preemptions_change_nothing(model, temperature):
    """Drafts are right or wrong by the grammar too, and what a preempted answer may say is not forgotten."""
    given = [replace(SAMPLED, temperature=temperature, grammar=of_schema(SCHEMA), seed=number) for number in range(4)]
    prompts = [[5, 9, 3 + number] for number in range(4)]
    plain = engine(model, max_length=LENGTH).generate(prompts, given)
    for answer, in plain:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    drafted = engine(model, max_length=LENGTH, draft_tokens=2, token_budget=16)
    blocks = max(len(answer.tokens) for answer, in plain) // 4 + 8
    tight = engine(model, max_length=4 * blocks, draft_tokens=2, num_blocks=blocks + 4)
    for one in (drafted, tight):
        again = one.generate(prompts, given)
        assert [answer.tokens for answer, in again] == [answer.tokens for answer, in plain]
    assert tight.statistics.preemptions > 0 and sum(tight.statistics.drafts_proposed) > 0


def test_a_grammar_that_begins_behind_reasoning(model, tokenizer):
    """Before the token everything may come but an end; a bias brings both."""
    (end,) = tokenizer.encode(END_THINK)
    grammar = of_schema({"enum": ["yes", "no"]}, begins_after=end)
    for seed in range(3):
        ((answer,),) = engine(model, max_length=LENGTH).generate(
            [[5, 9]], replace(SAMPLED, grammar=grammar, seed=seed, logit_bias={end: 6.0, tokenizer.eod: 8.0}))
        reasoning, _, text = answer.text.partition(END_THINK)
        assert json.loads(text) in ("yes", "no") and answer.finish_reason == "stop"
        assert not set(answer.tokens[answer.tokens.index(end) + 1:]) & {end}
    assert reasoning


def test_complete_answers_end_whatever_the_parameters_say(model, tokenizer):
    """Without an end of text, before min_tokens, and where a bias bans all that the grammar allows."""
    grammar = of_schema({"const": "ab"})
    for more in ({"ignore_eos": True}, {"min_tokens": 50}, {"temperature": 0.0},
                 {"logit_bias": dict.fromkeys(range(tokenizer.vocab_size), float("-inf"))}):
        ((answer,),) = engine(model, max_length=LENGTH).generate([[5, 9]], replace(SAMPLED, grammar=grammar, **more))
        assert (answer.text, answer.finish_reason) == ('"ab"', "stop"), more


def test_an_end_comes_only_where_the_answer_may_end(model, tokenizer):
    """Ends beside the tokenizer's own are allowed as that one is: letters here, which the grammar has as well."""
    grammar = Grammar(definition(lark_grammar="start: /a{3,9}/"))
    (letter,) = tokenizer.encode("b")
    for seed in range(6):
        ((answer,),) = engine(model, max_length=LENGTH).generate(
            [[5, 9]], replace(SAMPLED, grammar=grammar, stop_token_ids=(letter,), logit_bias={letter: 9.0}, seed=seed))
        assert re.fullmatch("a{3,9}", answer.text) and answer.tokens[-1] == letter


def test_no_text_has_an_added_token(model, tokenizer):
    """A token of the chat would be as good as its letters in a string, and end the message when it is replayed."""
    banned = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]) in ADDED]
    bias = {token: 30.0 for token in banned}
    ((answer,),) = engine(model, max_length=LENGTH).generate([[5, 9]], replace(
        SAMPLED, grammar=of_schema({"type": "string", "maxLength": 90, "minLength": 60}), logit_bias=bias))
    assert len(banned) == len(ADDED) and answer.finish_reason == "stop" and not set(answer.tokens[:-1]) & set(banned)


@pytest.mark.parametrize("given, message", [
    (definition(json_schema={"type": "foo"}), "the field: Invalid type: foo"),
    (definition(json_schema={"type": "array", "uniqueItems": True}), "the field: Unimplemented keys"),
    (definition(lark_grammar="start: /(a/"), "the field: .*unclosed group"), ("{}", "the field: ")])
def test_what_cannot_be_kept_to_is_refused_in_one_line(model, given, message):
    one = engine(model, max_length=LENGTH)
    with pytest.raises(ValueError, match=message) as error:
        one.add([5], replace(SAMPLED, grammar=Grammar(given, name="the field")))
    assert "\n" not in str(error.value) and not one.has_work


def test_without_the_library_or_a_tokenizer_it_says_so(model, meshes, monkeypatch):
    grammar = of_schema({}, name="response_format")
    for tokenizer in (None, ByteTokenizer()):
        other = engine(loaded(V3_MTP, meshes, tokenizer=tokenizer))
        with pytest.raises(ValueError, match="response_format: needs a model with a tokenizer.json"):
            other.check([5], SamplingParameters(grammar=grammar))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="response_format: needs the package llguidance.*pip install"):
        engine(model, max_length=LENGTH).check([5], SamplingParameters(grammar=grammar))
    with pytest.raises(ValueError, match="grammar {} is no Grammar"):
        SamplingParameters(grammar={})
