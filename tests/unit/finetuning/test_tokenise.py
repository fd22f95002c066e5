"""Tokenising: over-long conversations, the cache and its key, parts that survive kill -9, the loss weights' file."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from chat_tokenizers import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.finetuning import tokenise
from megatron_deepseek.finetuning.loss_weights import LossWeights, WeightsWriter
from megatron_deepseek.finetuning.prepare import prepare, refuse_same
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.finetuning.settings import DataSettings


def chat(*texts, **more) -> dict:
    return {"messages": [{"role": ("user", "assistant")[number % 2], "content": text}
                         for number, text in enumerate(texts)]} | more


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_settings(path, **options) -> DataSettings:
    return DataSettings(**{"dataset": (str(path),), "tokenizer_type": "ByteTokenizer", "seq_length": 64,
                           "num_workers": 1} | options)


def quiet(settings: DataSettings):
    return prepare(settings, lambda _: None)


def texts(prepared) -> list[str]:
    tokenizer, rows = build_tokenizer("ByteTokenizer"), Rows(prepared)
    return [tokenizer.decode(rows.sample(0, number)[0].tolist()) for number in range(rows.samples_per_epoch)]


# Over-long conversations ----------------------------------------------------------------------------------------------

LONG = chat("Q", "A", "Q2", "A" * 20)  # 6 tokens in its first exchange, BOS U Q A A EOS, and 25 more
SHORT, HUGE = chat("Q", "A"), chat("Q", "A" * 50)


def test_over_long_ones_are_dropped_and_counted(tmp_path):
    prepared = quiet(data_settings(write(tmp_path / "a.jsonl", [LONG, SHORT, HUGE]), max_length=20))
    assert prepared.total.dropped == {"longer than --max-length 20": 2}
    assert texts(prepared) == ["<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜>A<｜end▁of▁sentence｜>"]


def test_truncation_keeps_whole_turns_where_they_fit(tmp_path):
    prepared = quiet(data_settings(write(tmp_path / "a.jsonl", [LONG, HUGE]), max_length=20, overlong="truncate"))
    short = "<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜>A"
    assert texts(prepared) == [f"{short}<｜end▁of▁sentence｜>", short + "A" * 15]  # the second has nothing to drop
    assert prepared.total.tokens == 6 + 20


def test_an_over_long_one_can_be_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a.jsonl line 2: the conversation has 31 tokens, more than --max-length 20"):
        quiet(data_settings(write(tmp_path / "a.jsonl", [SHORT, LONG]), max_length=20, overlong="error"))


def test_a_conversation_of_max_length_fits_into_a_row(tmp_path):
    length = len(Rows(quiet(data_settings(write(tmp_path / "a.jsonl", [LONG])))).sample(0, 0)[0])
    assert quiet(data_settings(tmp_path / "a.jsonl", max_length=length, seq_length=length)).total.samples == 1
    with pytest.raises(ValueError, match="nothing with loss in the whole set of 1 rows .1 longer than --max-length 30"):
        quiet(data_settings(tmp_path / "a.jsonl", max_length=length - 1, seq_length=length))
    with pytest.raises(ValueError, match="--max-length 90 does not fit into rows of --seq-length 64"):
        data_settings(tmp_path / "a.jsonl", max_length=90)


# The cache ------------------------------------------------------------------------------------------------------------

def made(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "finetuning").iterdir()}


def test_it_is_made_once(tmp_path, monkeypatch):
    settings = data_settings(write(tmp_path / "a.jsonl", [SHORT, LONG]))
    first = quiet(settings)
    monkeypatch.setattr(tokenise, "make_parts", None)
    assert quiet(replace(settings, seq_length=128, max_length=64, num_workers=2)).prefixes == first.prefixes
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())  # the content counts, not the name
    copied = quiet(replace(settings, dataset=(str(tmp_path / "copy" / "b.jsonl"),),
                           data_cache_path=str(tmp_path / "cache")))
    assert copied.prefixes == first.prefixes and len(made(tmp_path)) == 1


def test_its_key_is_all_that_decides_the_tokens(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    settings = data_settings(write(tmp_path / "a.jsonl", [SHORT, LONG]), tokenizer_type="HuggingFaceTokenizer",
                             tokenizer_model=tokenizer, template="deepseek-r1")
    variants = [settings, replace(settings, template="deepseek-v3"), replace(settings, history_reasoning="keep"),
                replace(settings, train_think_prefix=True), replace(settings, max_length=40),
                replace(settings, overlong="truncate")]
    for count, variant in enumerate(variants, 1):
        quiet(variant)
        assert len(made(tmp_path)) == count, variant
    other = tmp_path / "tokenizer" / "tokenizer.json"
    other.write_text(json.dumps(json.loads(other.read_text()), indent=3))
    quiet(settings)
    write(tmp_path / "a.jsonl", [SHORT])
    quiet(settings)
    assert len(made(tmp_path)) == len(variants) + 2


def test_damaged_files_are_made_again(tmp_path):
    settings = data_settings(write(tmp_path / "a.jsonl", [SHORT, LONG]))
    prefix = quiet(settings).prefixes[0]
    whole = {suffix: Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx", ".weights")}
    for suffix, content in whole.items():
        Path(prefix + suffix).write_bytes(content[:-1])
        quiet(settings)
        assert {each: Path(prefix + each).read_bytes() for each in whole} == whole
    os.unlink(prefix + ".weights")
    quiet(settings)
    assert Path(prefix + ".weights").read_bytes() == whole[".weights"]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the cache .*; --data-cache-path puts it elsewhere"):
        quiet(data_settings(write(tmp_path / "a.jsonl", [SHORT]), data_cache_path=str(tmp_path / "file")))


def test_the_evaluation_set_must_be_another(tmp_path):
    train = quiet(data_settings(write(tmp_path / "a.jsonl", [SHORT, LONG])))
    converted = [{"conversations": [{"from": each["role"], "value": each["content"]} for each in row["messages"]]}
                 for row in (SHORT, LONG)]
    for name, content in (("same", [SHORT, LONG]), ("converted", converted)):
        held_out = quiet(data_settings(write(tmp_path / f"{name}.jsonl", content), option="--eval-dataset"))
        with pytest.raises(ValueError, match=f"--eval-dataset .*{name}.jsonl is the same as --dataset .*a.jsonl"):
            refuse_same(train, held_out)
    refuse_same(train, quiet(data_settings(write(tmp_path / "b.jsonl", [SHORT]), option="--eval-dataset")))


# Workers and kills ----------------------------------------------------------------------------------------------------

def many(path: Path, count=6000) -> Path:
    return write(path, (chat(f"Q{number}" * 20, f"A{number}" * (number % 50 + 1)) for number in range(count)))


def content_of(prepared) -> list[bytes]:
    return [Path(prepared.prefixes[0] + suffix).read_bytes() for suffix in (".bin", ".idx", ".weights")]


def test_any_number_of_workers_and_a_kill_give_the_same_bytes(tmp_path):
    path = many(tmp_path / "a.jsonl")
    whole = quiet(data_settings(path, seq_length=512, data_cache_path=str(tmp_path / "whole")))
    assert whole.total.samples == 6000
    tokens = LossWeights(whole.prefixes[0] + ".weights")
    ids, rows = build_tokenizer("ByteTokenizer"), Rows(whole)
    assert len(tokens) == 6000 and [ids.decode(rows.sample(0, number)[0].tolist()).startswith(
        f"<｜begin▁of▁sentence｜><｜User｜>Q{number}Q") for number in (0, 1, 3000, 5999)] == [True] * 4
    both = quiet(data_settings(path, seq_length=512, num_workers=2, data_cache_path=str(tmp_path / "two")))
    assert content_of(both) == content_of(whole)
    _kill_in_the_middle(path, tmp_path / "killed")
    there = {int(path.stem) for path in (tmp_path / "killed").glob("finetuning/*/parts/*.json")}
    made, make = set(), tokenise.PartMaker.make

    def counted(maker):
        made.add(maker.part.number)
        return make(maker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenise.PartMaker, "make", counted)
        patch.setattr(tokenise, "run_tasks", lambda tasks, work, workers, tick: map(work, tasks))
        again = quiet(data_settings(path, seq_length=512, data_cache_path=str(tmp_path / "killed")))
    assert content_of(again) == content_of(whole)
    assert there and made and not there & made
    assert not (Path(again.prefixes[0]).parent / "parts").exists()


def _kill_in_the_middle(path: Path, cache: Path):
    """Start tokenising in a process of its own, and kill -9 it as soon as a part is whole."""
    code = ("import sys, time\nfrom megatron_deepseek.finetuning import tokenise\n"
            "from megatron_deepseek.finetuning.prepare import prepare\n"
            "from megatron_deepseek.finetuning.settings import DataSettings\n"
            "make = tokenise.PartMaker.make\n"
            "def slowly(self):\n    summary = make(self)\n    time.sleep(0.5)\n    return summary\n"
            "tokenise.PartMaker.make = slowly\n"
            f"prepare(DataSettings(({str(path)!r},), 'ByteTokenizer', seq_length=512, num_workers=1, "
            f"data_cache_path={str(cache)!r}))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 60
    while not list(cache.glob("finetuning/*/parts/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("finetuning/*/done.json"))


# Loss weights ---------------------------------------------------------------------------------------------------------

RUNS = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.0, 1.0, 0.5])), min_size=1, max_size=4)


@settings(deadline=None)
@given(samples=st.lists(RUNS, max_size=5))
def test_loss_weights_come_back(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("weights") / "a.weights"
    writer = WeightsWriter()
    for runs in samples:
        writer.add(runs)
    writer.write(path)
    weights = LossWeights(path)
    assert len(weights) == len(samples)
    for number, runs in enumerate(samples):
        assert weights.of(number).tolist() == [weight for count, weight in runs for _ in range(count)]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="a.weights is no whole file of loss weights"):
        LossWeights(path)


def test_the_data_needs_no_torch_until_rows_are_read(tmp_path):
    path = str(write(tmp_path / "a.jsonl", [SHORT]))
    code = ("import sys\nfrom megatron_deepseek.finetuning.describe import describe\n"
            "from megatron_deepseek.finetuning.prepare import prepare\n"
            "from megatron_deepseek.finetuning.settings import DataSettings\n"
            f"print(describe(prepare(DataSettings(({path!r},), 'ByteTokenizer')), 1))\n"
            "assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0 and "⟦A<｜end▁of▁sentence｜>⟧" in done.stdout, done.stderr
