"""Preference data: every form is read alike, pairs stay together in rows, and what is wrong is told with its line."""

import json

import numpy as np
import pytest
import torch
from preference_data import labelled, pairs, rows_of, write_rows

from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.finetuning.conversation import BadRow
from megatron_deepseek.finetuning.describe import describe
from megatron_deepseek.finetuning.preference.inputs import LAST, REFERENCE, VALUES, MismatchedRows, PreferenceSampler
from megatron_deepseek.finetuning.preference.sums_file import SumsFile
from megatron_deepseek.finetuning.preferences import to_labelled, to_pair
from megatron_deepseek.finetuning.prepare import prepare
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.finetuning.settings import CONVERSATIONS, LABELLED, PAIRS, DataSettings

USER, YES, NO = ({"role": role, "content": content} for role, content in (
    ("user", "Q"), ("assistant", "yes"), ("assistant", "no")))


def sharegpt(*turns: dict) -> list[dict]:
    return [{"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in turns]


PAIR_FORMS = {
    "TRL, plain": {"prompt": "Q", "chosen": "yes", "rejected": "no"},
    "TRL, conversational": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "TRL, implicit prompt": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "TRL, a text beside whole conversations": {"prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO]},
    "TRL, one message": {"prompt": [USER], "chosen": YES, "rejected": NO},
    "plain texts that begin alike": {"chosen": "Q yes", "rejected": "Q no"},
    "LLaMA-Factory, alpaca": {"instruction": "Q", "input": "", "chosen": "yes", "rejected": "no"},
    "LLaMA-Factory, sharegpt": {"conversations": sharegpt(USER), "chosen": sharegpt(YES)[0],
                                "rejected": sharegpt(NO)[0]},
    "ms-swift, a response": {"messages": [USER, YES], "rejected_response": "no"},
    "ms-swift, messages": {"messages": [USER, YES], "rejected_messages": [USER, NO]},
    "query": {"query": "Q", "chosen": "yes", "rejected": "no"},
}


@pytest.mark.parametrize("form", PAIR_FORMS)
def test_forms_of_pairs_are_read_alike(form):
    found = to_pair(PAIR_FORMS[form])
    assert [[(turn.role, turn.content, turn.weight) for turn in each.turns] for each in found.conversations] == [
        [("user", "Q", 1.0), ("assistant", answer, 1.0)] for answer in ("yes", "no")]
    assert found.values == (0.0, 0.0)


def test_common_turns_have_no_loss():
    """An earlier answer that both sides have; a system text; the margin."""
    before = [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "A"}, USER]
    found = to_pair({"prompt": before, "chosen": [YES], "rejected": [NO], "margin": 2})
    for each in found.conversations:
        assert [turn.weight for turn in each.turns if turn.role == "assistant"] == [0.0, 1.0]
    assert found.values == (2.0, 0.0)


@pytest.mark.parametrize("row, sign", [
    ({"prompt": "Q", "completion": "yes", "label": True}, 1.0),
    ({"prompt": [USER], "completion": [YES], "label": False}, -1.0),
    ({"messages": [USER, YES], "label": 0}, -1.0),
    ({"conversations": sharegpt(USER, YES), "kto_tag": "true"}, 1.0),
    ({"instruction": "Q", "output": "yes", "kto_tag": True}, 1.0)])
def test_forms_of_labelled_answers_are_read_alike(row, sign):
    found = to_labelled(row)
    (conversation,) = found.conversations
    assert [(turn.role, turn.content) for turn in conversation.turns] == [("user", "Q"), ("assistant", "yes")]
    assert found.values == (sign,)


def test_a_pair_is_a_good_and_a_bad_answer():
    assert to_labelled(PAIR_FORMS["TRL, plain"]).values == (1.0, -1.0)


def test_labelled_answers_have_loss_behind_the_last_question():
    found = to_labelled({"messages": [USER, YES, USER, NO], "label": True})
    assert [turn.weight for turn in found.conversations[0].turns] == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("reader, row, reason", [
    (to_pair, {"prompt": "Q", "chosen": "yes"}, "no rejected"),
    (to_pair, {"prompt": "Q", "chosen": "", "rejected": "no"}, "no chosen"),
    (to_pair, {"prompt": "Q", "chosen": "yes", "rejected": "yes"}, "equal pair"),
    (to_pair, {"chosen": [USER, YES], "rejected": [{"role": "user", "content": "other"}, NO]}, "no common prompt"),
    (to_pair, {"chosen": "yes", "rejected": "no"}, "no common prompt"),
    (to_pair, {"rejected_response": "no"}, "missing field"),
    (to_pair, {"messages": [USER, YES], "rejected_response": ["no", "none"]}, "wrong type"),
    (to_pair, {"prompt": "Q", "chosen": "yes", "rejected": "no", "margin": "much"}, "wrong margin"),
    (to_pair, ["no", "row"], "not an object"),
    (to_labelled, {"prompt": "Q", "completion": "yes"}, "no label"),
    (to_labelled, {"prompt": "Q", "completion": "yes", "label": "perhaps"}, "wrong label")])
def test_bad_rows(reader, row, reason):
    with pytest.raises(BadRow) as found:
        reader(row)
    assert found.value.reason == reason and "\n" not in str(found.value)


def test_a_bad_row_is_told_with_file_and_line(tmp_path):
    file = write_rows(tmp_path / "p.jsonl", [*pairs(2), {"prompt": "Q", "chosen": "yes"}])
    with pytest.raises(ValueError, match=rf"^{file} line 3: the row has no rejected answer; it has 'prompt', 'chosen'"):
        rows_of(file, "dpo")


def test_entries_of_llama_factory(tmp_path):
    """A ranking with columns and tags of its own, and labels for KTO; the same entry is refused for plain fine-tuning.
    """
    write_rows(tmp_path / "r.json", [{"talk": sharegpt(USER), "good": sharegpt(YES)[0], "bad": sharegpt(NO)[0]}])
    write_rows(tmp_path / "k.json", [{"conversations": sharegpt(USER, YES), "tag": True},
                                     {"conversations": sharegpt(USER, NO), "tag": False}])
    info = {"r": {"file_name": "r.json", "ranking": True, "formatting": "sharegpt",
                  "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"}},
            "k": {"file_name": "k.json", "formatting": "sharegpt", "columns": {"kto_tag": "tag"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    given = {"tokenizer_type": "ByteTokenizer", "template": "deepseek-v3", "seq_length": 32, "num_workers": 1}

    def rows(name: str, kind: str) -> Rows:
        return Rows(prepare(DataSettings((f"{tmp_path}/dataset_info.json:{name}",), kind=kind, **given), str))

    assert texts(rows("r", PAIRS)) == ["<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜>" + answer +
                                       "<｜end▁of▁sentence｜>" for answer in ("yes", "no")]
    assert rows("k", LABELLED).values[0].tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="ranking true.*--objective dpo"):
        rows("r", CONVERSATIONS)


def texts(rows: Rows) -> list[str]:
    tokenizer = build_tokenizer("ByteTokenizer")
    return [tokenizer.decode(rows.sample(0, number)[0].tolist()) for number in range(rows.samples_per_epoch)]


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_no_pair_is_torn(tmp_path, packing):
    """Each pair is in one row, chosen before rejected; every sample is there once."""
    rows = rows_of(write_rows(tmp_path / "p.jsonl", pairs(31)), "dpo", packing=packing, seq_length=64)
    seen = []
    for number in range(rows.rows_per_epoch):
        samples = [sample for _, sample in rows.samples_in(number)]
        assert samples[1::2] == [sample + 1 for sample in samples[::2]] and not any(s % 2 for s in samples[::2])
        assert len(set(rows[number]["documents"].tolist())) in (len(samples), len(samples) + 1)
        seen += samples
    assert sorted(seen) == list(range(62))
    assert rows.rows_per_epoch == 31 if not packing else rows.rows_per_epoch < 31


def test_units_of_labelled_answers_hold_two_at_random(tmp_path):
    """An odd number: one is by itself. Neighbours of the file, often answers to one question, are rarely together."""
    rows = rows_of(write_rows(tmp_path / "k.jsonl", labelled(41)), "kto", packing=False)
    units = [[sample for _, sample in rows.samples_in(number)] for number in range(rows.rows_per_epoch)]
    assert sorted(map(len, units)) == [1, *(2,) * 20]
    assert sorted(sum(units, [])) == list(range(41))
    assert sum(abs(unit[0] - unit[-1]) == 1 for unit in units if len(unit) == 2) < 6


def test_mismatched_rows_cross_questions_and_answers(tmp_path):
    rows = rows_of(write_rows(tmp_path / "k.jsonl", labelled(9)), "kto", packing=False)
    tokenizer, crossed = build_tokenizer("ByteTokenizer"), MismatchedRows(rows)
    for number in range(rows.rows_per_epoch):
        here, own, other = rows.samples_in(number), rows[number], crossed[number]
        if len(here) == 1:
            assert not other["loss_mask"].any()
            continue
        (_, first), (_, second) = here
        question = "<｜begin▁of▁sentence｜><｜User｜>{}?<｜Assistant｜>"
        text = tokenizer.decode(other["tokens"][other["documents"] == 0].tolist())
        assert text == question.format(first) + "a" * (1 + second % 4)
        text = tokenizer.decode(other["tokens"][other["documents"] == 1].tolist())
        assert text == question.format(second) + "a" * (1 + first % 4)
        assert other["real"].sum() == own["real"].sum() and other["loss_mask"].sum() == own["loss_mask"].sum()


def test_numbers_of_documents_stand_on_first_and_last_tokens(tmp_path):
    rows = rows_of(write_rows(tmp_path / "p.jsonl", pairs(7)), "reward")
    sums = (np.arange(14, dtype=np.float64) + 1,)
    batch = PreferenceSampler(Sampler(rows, 512, ""), rows, sums).batch(0, rows.rows_per_epoch + 1, 1)
    for number in range(rows.rows_per_epoch + 1):
        samples = [sample for _, sample in rows.samples_in(number)]
        for name, column in ((REFERENCE, sums[0]), (VALUES, rows.values[0])):
            found = [batch.per_token[name][number][batch.documents_BS[number] == document]
                     for document in range(len(samples))]
            assert [each[0].item() for each in found] == [column[sample] for sample in samples]
            assert not any(each[1:].any() for each in found)
        ends = batch.tokens_BS[number][batch.per_token[LAST][number].bool() & batch.real_BS[number]]
        assert ends.tolist() == [257] * len(samples)  # the end of sentence is read
    assert not batch.per_token[REFERENCE][-1].any()


def test_over_long_sides_drop_the_pair(tmp_path):
    """Half a row is the most of a side; a cut that leaves both sides alike leaves nothing to prefer."""
    rows = [*pairs(1), {"prompt": "q", "chosen": "x" * 40, "rejected": "no"}]
    prepared = rows_of(write_rows(tmp_path / "p.jsonl", rows), "dpo").prepared
    assert prepared.total.dropped == {"longer than --max-length 16": 1} and prepared.total.samples == 2
    alike = [*pairs(1), {"prompt": "q", "chosen": "x" * 40, "rejected": "x" * 39 + "y"}]
    prepared = rows_of(write_rows(tmp_path / "q.jsonl", alike), "dpo", overlong="truncate").prepared
    assert prepared.total.dropped == {"both answers are the same tokens": 1} and prepared.total.samples == 2


def test_a_side_is_at_most_half_of_a_row(tmp_path):
    with pytest.raises(ValueError, match="--max-length 18 does not fit.*both sides of a pair share a row"):
        rows_of(tmp_path / "p.jsonl", "dpo", max_length=18)


# The file of sums -----------------------------------------------------------------------------------------------------


def test_a_file_of_sums_goes_on_where_it_was(tmp_path):
    file = SumsFile(tmp_path / "s.npy", 3)
    file.numbers[1] = -2.5
    file.flush()
    again = SumsFile(tmp_path / "s.npy", 3)
    assert again.missing.tolist() == [True, False, True] and again.numbers[1] == -2.5


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"rubbish"),
                                    lambda path: path.write_bytes(path.read_bytes()[:-4]),
                                    lambda path: np.save(path, np.zeros(3, np.float32))])
def test_a_damaged_file_of_sums_is_begun_anew(tmp_path, damage):
    path = tmp_path / "s.npy"
    SumsFile(path, 3).numbers[:] = 1.0
    damage(path)
    assert SumsFile(path, 3).missing.all()


def test_values_of_blends(tmp_path):
    """Values are read by dataset, in the order of the command line."""
    files = [write_rows(tmp_path / name, labelled(number)) for name, number in (("a.jsonl", 3), ("b.jsonl", 4))]
    settings = DataSettings(tuple(map(str, files)), tokenizer_type="ByteTokenizer", template="deepseek-v3",
                            seq_length=32, num_workers=1, kind=LABELLED)
    found = [values.tolist() for values in Rows(prepare(settings, str)).values]
    assert found == [[-1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]]
    assert torch.tensor(found[0]).sum() == 1


def test_a_dry_run_says_what_each_sample_is(tmp_path):
    shown = describe(rows_of(write_rows(tmp_path / "p.jsonl", pairs(2)), "dpo").prepared, 4)
    assert "sample 1, chosen: 6 tokens, 2 with loss" in shown and "sample 2, rejected: 7 tokens, 3 with loss" in shown
    shown = describe(rows_of(write_rows(tmp_path / "k.jsonl", labelled(2)), "kto").prepared, 4)
    assert "sample 1, bad: " in shown and "sample 2, good: " in shown
