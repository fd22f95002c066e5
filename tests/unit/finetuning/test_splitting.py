"""--split-turns reasoning: each answer with thoughts behind the very prompt that its release renders."""

import json

import pytest
from chat_tokenizers import write_tokenizer
from test_templates import TALK, release

from megatron_deepseek.data.tokenizer import EOD
from megatron_deepseek.finetuning.conversation import Conversation, ToolCall, Turn
from megatron_deepseek.finetuning.prepare import mask_rule, prepare
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.finetuning.settings import DataSettings
from megatron_deepseek.finetuning.splitting import split_by_reasoning
from megatron_deepseek.finetuning.templates import TEMPLATES

WRITTEN = {"deepseek-r1": "<think>\n{0}\n</think>\n\n{1}", "deepseek-v3.1": "<think>{0}</think>{1}"}
MIXED = (*TALK, Turn("user", "Q3"), Turn("assistant", "A3"), Turn("user", "Q4"), Turn("assistant", "A4"),
         Turn("user", "Q5"), Turn("assistant", "C", "R5", (ToolCall("f", "{}"),)), Turn("tool", "O"),
         Turn("assistant", "A5", "R6"), Turn("user", "Q6"), Turn("assistant", "A6", "R7", weight=0.0))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_sample_is_the_releases_prompt_and_one_answer(name):
    """The release is given the thoughts of the history too, as a client that keeps all text would, and drops them."""
    written = [Turn(turn.role, WRITTEN[name].format(turn.reasoning, turn.content)) if turn.reasoning else turn
               for turn in TALK]
    samples = split_by_reasoning(Conversation(TALK))
    assert [len(sample.turns) for sample in samples] == [3, 5]
    for sample in samples:
        pieces, answer = TEMPLATES[name].render(sample), sample.turns[-1]
        prompt = release(name, written[:len(sample.turns) - 1], add_generation_prompt=True, thinking=True)
        emitted = WRITTEN[name].format(answer.reasoning, answer.content).removeprefix("<think>").lstrip()
        without = [piece.text for piece in pieces if not piece.weight]
        trained = [piece.text for piece in pieces if piece.weight]
        assert "".join(without) == prompt
        assert "".join(trained) == emitted + EOD
        assert [piece.text for piece in pieces] == without + trained


def test_every_turn_with_loss_has_it_once():
    samples = split_by_reasoning(Conversation(MIXED, ({"name": "f"},)))
    trained = [[index for index, turn in enumerate(sample.turns) if turn.role == "assistant" and turn.weight]
               for sample in samples]
    assert trained == [[2], [4], [6, 8], [10, 12]]
    assert [len(sample.turns) for sample in samples] == [3, 5, 9, 13]
    assert all(sample.tools == ({"name": "f"},) for sample in samples)


def test_what_has_no_thoughts_stays_whole():
    plain = Conversation(tuple(Turn(turn.role, turn.content) for turn in TALK))
    assert split_by_reasoning(plain) == [plain]
    silent = Conversation((Turn("user", "Q"), Turn("assistant", "A", "R", weight=0.0)))
    assert split_by_reasoning(silent) == [silent]  # nothing with loss: counted as such


def test_samples_of_files(tmp_path):
    """A row of two answers gives two samples with each one's tokens, in another cache; no thought is left out."""
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": [{"role": turn.role, "content": turn.content} | (
        {"reasoning_content": turn.reasoning} if turn.reasoning else {}) for turn in TALK]}) + "\n")
    given = dict(dataset=(str(path),), tokenizer_model=str(write_tokenizer(tmp_path / "tokenizer")), seq_length=64,
                 template="deepseek-r1", num_workers=1)
    whole, split = (prepare(DataSettings(**given, split_turns=how), lambda _: None) for how in ("none", "reasoning"))
    assert [each.total.rows for each in (whole, split)] == [1, 1]
    assert [each.total.samples for each in (whole, split)] == [1, 2]
    assert whole.total.left_out and not split.total.left_out
    assert len(Rows(split).sample(0, 0)[0]) < len(Rows(split).sample(0, 1)[0]) == len(Rows(whole).sample(0, 0)[0])
    assert "each answer with reasoning is a sample of its own" in mask_rule(
        TEMPLATES["deepseek-r1"], split.settings)
