"""Rows: best-fit packing, epochs in which each sample is once, batches that depend on consumed rows alone, dry runs."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.finetuning.describe import describe, histogram
from megatron_deepseek.finetuning.packing import pack
from megatron_deepseek.finetuning.prepare import prepare
from megatron_deepseek.finetuning.prompts import held_out_prompts
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.finetuning.settings import DataSettings

TOKENIZER = build_tokenizer("ByteTokenizer")


def write_chats(path, count: int, seed: int = 0):
    """Write conversations of 1 to 3 exchanges, of which the middle one is not trained."""
    numbers = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        messages = []
        for turn in range(numbers.integers(1, 4)):
            messages += [{"role": "user", "content": f"{number}?" + "q" * int(numbers.integers(0, 8))},
                         {"role": "assistant", "content": "a" * int(numbers.integers(1, 12)), "loss": turn != 1}]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_settings(*dataset: str, **options) -> DataSettings:
    return DataSettings(**{"dataset": dataset, "tokenizer_type": "ByteTokenizer", "seq_length": 128,
                           "num_workers": 1} | options)


def prepared(*dataset: str, **options):
    return prepare(data_settings(*dataset, **options), lambda _: None)


# Packing --------------------------------------------------------------------------------------------------------------

def best_fit(lengths, room: int) -> list[int]:
    """Return the sorted fills of best fit decreasing, one sample at a time: the definition."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(rows)) if rows[row] + length <= room]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return sorted(rows)


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 20), max_size=60), room=st.integers(20, 40), seed=st.integers(0, 3))
def test_packing_is_best_fit_and_loses_nothing(lengths, room, seed):
    lengths = np.array(lengths, np.int32)
    samples, starts = pack(lengths, room, seed)
    assert sorted(samples.tolist()) == list(range(len(lengths)))
    fills = [int(lengths[samples[begin:end]].sum()) for begin, end in zip(starts[:-1], starts[1:])]
    assert sorted(fills) == best_fit(lengths.tolist(), room)
    again, _ = pack(lengths, room, seed)
    assert again.tolist() == samples.tolist()


def test_ten_million_samples_are_a_matter_of_seconds():
    lengths = np.random.default_rng(0).lognormal(5, 1, 200_000).clip(2, 4096).astype(np.int32)
    _, starts = pack(lengths, 4096, 0)
    assert lengths.sum() / ((len(starts) - 1) * 4096) > 0.99


# Rows -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_has_each_sample_once(tmp_path, packing):
    rows = Rows(prepared(write_chats(tmp_path / "a.jsonl", 50), packing=packing))
    orders = []
    for epoch in range(3):
        numbers = range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch)
        seen = [sample for number in numbers for sample in rows.samples_in(number)]
        assert sorted(seen) == [(0, number) for number in range(50)]
        orders.append(tuple(seen))
    assert len(set(orders)) == 3
    assert rows.rows_per_epoch == 50 if not packing else rows.rows_per_epoch < 25


def test_a_row_is_its_samples_and_nothing_else(tmp_path):
    rows = Rows(prepared(write_chats(tmp_path / "a.jsonl", 30)))
    for number in range(rows.rows_per_epoch):
        row, at = rows[number], 0
        for document, (source, sample) in enumerate(rows.samples_in(number)):
            ids, weights = rows.sample(source, sample)
            part = slice(at, at + len(ids) - 1)
            assert row["tokens"][part].tolist() == ids[:-1].tolist()
            assert row["labels"][part].tolist() == ids[1:].tolist()
            assert row["loss_mask"][part].tolist() == weights[1:].tolist()
            assert set(row["documents"][part].tolist()) == {document} and row["real"][part].all()
            assert row["labels"][part.stop - 1] == TOKENIZER.eod
            at = part.stop
        assert not row["loss_mask"][at:].any() and not row["real"][at:].any()
        assert set(row["documents"][at:].tolist()) <= {document + 1}
    total = sum(int(rows[number]["real"].sum()) for number in range(rows.rows_per_epoch))
    assert total == rows.tokens_per_epoch


def test_loss_is_on_trained_answers_and_their_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}))
    row = Rows(prepared(str(path), packing=False, seq_length=8))[0]
    bos, user, assistant, end = 256, 258, 259, 257
    assert row["tokens"].tolist() == [bos, user, ord("Q"), assistant, ord("A"), end, end, end]
    assert row["labels"].tolist() == [user, ord("Q"), assistant, ord("A"), end, end, end, end]
    assert row["loss_mask"].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert row["real"].tolist() == [True] * 5 + [False] * 3


def test_batches_depend_on_consumed_rows_alone(tmp_path):
    made = prepared(write_chats(tmp_path / "a.jsonl", 60))
    sampler = Sampler(Rows(made), TOKENIZER.vocab_size, "--dataset")
    whole = sampler.batch(4, 8, 8)
    for dp_size, micro in ((2, 2), (4, 1), (1, 2), (2, 4)):
        fresh = Sampler(Rows(made), TOKENIZER.vocab_size, "--dataset")  # resumed: nothing but the number is known
        parts = [fresh.batch(4, 8, micro, rank, dp_size) for rank in range(dp_size)]
        order = [4 + step * micro * dp_size + rank * micro + row for rank in range(dp_size)
                 for step in range(8 // (micro * dp_size)) for row in range(micro)]
        for name in ("tokens_BS", "labels_BS", "weights_BS", "documents_BS", "real_BS"):
            found = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(found, getattr(whole, name)[[each - 4 for each in order]]), name


def test_rows_behind_the_last_epoch_are_blank(tmp_path):
    rows = Rows(prepared(write_chats(tmp_path / "a.jsonl", 10)), epochs=2)
    batch = Sampler(rows, TOKENIZER.vocab_size, "--dataset").batch(rows.rows_per_epoch * 2 - 1, 3, 3)
    assert batch.real_BS.any(1).tolist() == [True, False, False]
    assert batch.weights_BS.any(1).tolist() == [True, False, False]


def test_weights_repeat_what_is_too_little_and_leave_nothing_out(tmp_path):
    small, large = write_chats(tmp_path / "a.jsonl", 10), write_chats(tmp_path / "b.jsonl", 40, seed=1)
    plain = Rows(prepared(small, large, packing=False))
    assert Counter(source for number in range(50) for source, _ in plain.samples_in(number)) == {0: 10, 1: 40}
    even = Rows(prepared("1", small, "1", large, packing=False))
    seen = Counter(sample for number in range(even.rows_per_epoch) for sample in even.samples_in(number))
    assert {seen[0, number] for number in range(10)} == {4} and {seen[1, number] for number in range(40)} == {1}
    batch = Sampler(Rows(prepared(small, large)), TOKENIZER.vocab_size, "--dataset").batch(0, 4, 4)
    assert batch.sources_BK.shape == (4, 2)


# What a dry run shows -------------------------------------------------------------------------------------------------

def test_a_dry_run_marks_trained_tokens_and_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    chats = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text, "loss": loss}]}
             for text, loss in (("A", True), ("B", 0.5), ("C", False), ("D" * 99, True), ("E", True))]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in [*chats, {"messages": []}]))
    made = prepared(str(path), max_bad_rows=1, max_length=32)
    shown = describe(made, 2, samples=2)
    assert "<｜User｜>Q<｜Assistant｜>⟦A<｜end▁of▁sentence｜>⟧\n" in shown and "⟦0.5×B<｜end▁of▁sentence｜>⟧" in shown
    for line in ("template deepseek-v3: loss on what the assistant emits", "6 rows, 3 samples, 18 tokens, 6 with loss",
                 "  dropped 1: longer than --max-length 32", "  dropped 1: nothing with loss",
                 "  dropped 1: no answer at the end", "a.jsonl line 6: there are no messages",
                 "an epoch: 3 samples in 1 rows of 128 (packed best fit, 88.3% padding), 15 tokens",
                 "steps per epoch with --global-batch-size 2: 0.5"):
        assert line in shown
    coloured = describe(made, 2, samples=1, colour=True)
    assert "\x1b[32mA<｜end▁of▁sentence｜>\x1b[0m" in coloured and "⟦" not in coloured


def test_a_dry_run_says_what_the_template_leaves_out(tmp_path):
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "R"}]
    path.write_text((json.dumps({"messages": messages * 3}) + "\n") * 2)
    shown = describe(prepared(str(path), history_reasoning="drop"), 1)
    assert "not shown 4: reasonings before the last question (--history-reasoning drop)" in shown


def test_histogram():
    lines = histogram(np.array([1, 2, 3, 4, 5, 8, 9]))
    assert [line.split()[:4] for line in lines] == [["1", "to", "1", "1"], ["2", "to", "2", "1"], ["3", "to", "4", "2"],
                                                    ["5", "to", "8", "2"], ["9", "to", "16", "1"]]


def test_prompts_of_held_out_conversations(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Q"}, {
        "role": "assistant", "content": "A", "reasoning_content": "R"}]}) + "\n" + json.dumps({"messages": []}) + "\n")
    (prompt,) = held_out_prompts(data_settings(str(path)))
    assert prompt.text == "<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜>"
    assert (prompt.answer, prompt.thinking) == ("A", True) and len(prompt.ids) == 4
