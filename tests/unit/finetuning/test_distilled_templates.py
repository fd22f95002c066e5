"""Chats of R1's distilled models: R1's string, in the ids of a tokenizer like Qwen2.5's or Llama 3's."""

import jinja2
import pytest
from chat_tokenizers import DISTILLED, write_distilled
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deepseek.data.tokenizer import ASSISTANT, BOS, EOD, USER, build_tokenizer
from megatron_deepseek.finetuning.conversation import Conversation, Turn
from megatron_deepseek.finetuning.encode import Encoder, choose_template
from megatron_deepseek.finetuning.templates import TEMPLATES, Rules

# tokenizer_config.json of DeepSeek-R1-Distill-Qwen and -Llama, without what it does with tools.
RELEASED = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}"
    "{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}")
TEXTS = st.text(st.sampled_from("ab \n.,:<>/天é0e\u030112"), min_size=1, max_size=12)


@pytest.fixture(scope="module", params=DISTILLED)
def folder(request, tmp_path_factory):
    return write_distilled(tmp_path_factory.mktemp(request.param), request.param, RELEASED)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return build_tokenizer("HuggingFaceTokenizer", folder)


def printed(turns, **options) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(RELEASED)
    return template.render(messages=messages, bos_token=BOS, eos_token=EOD, **options)


@settings(deadline=None, max_examples=25)
@given(system=st.none() | TEXTS, pairs=st.lists(st.tuples(TEXTS, TEXTS), max_size=2), last=TEXTS)
def test_ids_are_the_releases(tokenizer, folder, system, pairs, last):
    """Whole conversations and prompts, whose texts hold numbers and letters that are normalised."""
    template = choose_template("auto", tokenizer, folder)
    encoder = Encoder(tokenizer, template, Rules())
    turns = [Turn("system", system)] * (system is not None)
    for question, answer in pairs:
        turns += [Turn("user", question), Turn("assistant", answer)]
    if pairs:
        (encoded,) = encoder.encode([Conversation(tuple(turns))])
        assert encoded.ids == tokenizer.encode(printed(turns))
    turns.append(Turn("user", last))
    asked = tokenizer.encode(printed(turns, add_generation_prompt=True))
    assert encoder.prompt(Conversation(tuple(turns)), thinking=True) == asked


def test_training_follows_the_prompt_and_its_prefix_has_no_loss(tokenizer):
    """R1's string: <think>\\n is what the prompt forces, thoughts of earlier answers go."""
    encoder = Encoder(tokenizer, TEMPLATES["deepseek-r1"], Rules())
    talk = (Turn("system", "S"), Turn("user", "Q1"), Turn("assistant", "A1", "R1"), Turn("user", "Q2"),
            Turn("assistant", "A2", "R2"))
    (encoded,) = encoder.encode([Conversation(talk)])
    text, at = "", 0
    for count, weight in encoded.runs:
        run = tokenizer.decode(encoded.ids[at:at + count])
        text, at = text + (f"[{run}]" if weight else run), at + count
    assert text == (f"{BOS}S{USER}Q1{ASSISTANT}[\n\nA1{EOD}]{USER}Q2{ASSISTANT}<think>\n"
                    f"[R2\n</think>\n\nA2{EOD}]")
    asked = [Turn("system", "S"), Turn("user", "Q1"), Turn("assistant", "<think>\nR1\n</think>\n\nA1"),
             Turn("user", "Q2")]
    prompt = tokenizer.encode(printed(asked, add_generation_prompt=True))
    assert encoded.ids[:len(prompt)] == prompt


@pytest.mark.parametrize("base", DISTILLED)
def test_the_tokens_alone_tell_the_template(tmp_path, base):
    """Without the release's Jinja template: tokens of roles and thoughts, and none of tools, are the distilled models'.
    """
    folder = write_distilled(tmp_path / base, base, None)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder)
    assert choose_template("auto", tokenizer, folder).name == "deepseek-r1"
    assert [tokenizer.decode([identity]) for identity in (tokenizer.bos, tokenizer.eod)] == [BOS, EOD]
    assert tokenizer.adds_bos
