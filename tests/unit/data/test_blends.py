"""Blends of datasets: their weights at every moment, the splits and sources of their samples, their table, refusals."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
from small_datasets import EOD, SEQ, settings_of, tokens_of, train_set, write_dataset

from megatron_deepseek.arguments.data_paths import data_arguments, data_paths
from megatron_deepseek.arguments.parser import add_data
from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.data.blend import parse_blend, short_names
from megatron_deepseek.data.data_plan import SplitPlan
from megatron_deepseek.data.pretraining import build_datasets, check_data, make_plan
from megatron_deepseek.data.sample_index import PackedSplit
from megatron_deepseek.data.table import describe_split


def test_blend_keeps_its_weights_at_every_moment(tmp_path):
    write_dataset(tmp_path / "a", base=0)
    write_dataset(tmp_path / "b", base=2000, num_documents=10)
    blend = settings_of(0.3, tmp_path / "a", 0.7, tmp_path / "b", data_cache_path=str(tmp_path / "elsewhere"))
    dataset = train_set(blend, 1000)
    from_a = np.cumsum([max(tokens) < 2000 for tokens in tokens_of(dataset, 1000)])
    assert np.abs(from_a - 0.3 * np.arange(1, 1001)).max() <= 1
    assert tokens_of(train_set(blend, 50), 50) == tokens_of(dataset, 50)
    assert list((tmp_path / "elsewhere").glob("*.blend")) and not (tmp_path / "cache").exists()


def test_each_split_of_its_own(tmp_path):
    for name, base in (("a", 0), ("b", 2000), ("c", 4000)):
        write_dataset(tmp_path / name, base=base)
    settings = settings_of(split_data_paths=((str(tmp_path / "a"), str(tmp_path / "b")), (str(tmp_path / "c"),), None))
    train, valid, test = build_datasets(settings, (100, 9, 0))
    assert {sample // 2000 for tokens in tokens_of(train, 100) for sample in tokens if sample != EOD} == {0, 1}
    assert all(4000 <= token < 5000 or token == EOD for tokens in tokens_of(valid) for token in tokens)
    assert len(valid) == 2 * valid.samples_per_epoch or valid.samples_per_epoch >= 9
    assert test is None
    with pytest.raises(ValueError, match="--test-data-path is missing, and 4 samples of it are needed"):
        build_datasets(settings, (100, 9, 4))
    (tmp_path / "c.bin").unlink()
    with pytest.raises(ValueError, match="--valid-data-path .*/c: .*c.bin does not exist"):
        check_data(settings, 1000, (100, 9, 0))


def test_a_dataset_too_small_for_a_validation_sample_gives_none(tmp_path):
    """With hundreds of datasets one is; training must have some of each."""
    write_dataset(tmp_path / "a")
    write_dataset(tmp_path / "small", num_documents=4, base=2000)
    settings = settings_of(1, tmp_path / "a", 9, tmp_path / "small", split="90,10,0")
    plan = make_plan(settings, (20, 4, 0))
    assert plan.splits[1].weights == (1.0,) and plan.splits[1].left_out == (str(tmp_path / "small"),)
    assert plan.splits[0].weights == (0.1, 0.9) and not plan.splits[0].left_out
    train, valid, _ = build_datasets(settings, (20, 4, 0))
    assert len(train.datasets) == 2 and max(map(max, tokens_of(valid, 4))) < 2000
    assert "  without 1 dataset whose share is less than a sample: " in describe_split("valid", plan.splits[1])[1]
    with pytest.raises(ValueError, match="small: its train split .* too small for one sample"):
        check_data(dataclasses.replace(settings, split="10,90,0"), 10_000, (20, 4, 0))


def test_batches_say_which_dataset_each_row_is_from(tmp_path):
    """Also of one dataset twice; a single dataset has no sources. A wrong id is blamed on the dataset it is from."""
    for name, base in (("a", 0), ("b", 2000)):
        write_dataset(tmp_path / name, base=base)
    a, b = tmp_path / "a", tmp_path / "b"
    sampler = Sampler(train_set(settings_of(1, a, 2, b, 1, a), 64), 10_000, "")
    assert sampler.source_names == ("a", "b", "a#2")
    batch = sampler.batch(0, 64, 4)
    assert batch.sources_BK.sum(1).tolist() == [1] * 64 and batch.sources_BK.sum(0).tolist() == [16, 32, 16]
    from_b = [max(row) >= 2000 for row in batch.tokens_BS.tolist()]
    assert batch.sources_BK[:, 1].tolist() == from_b
    assert Sampler(train_set(settings_of(a), 8), 1000, "").batch(0, 8, 4).sources_BK is None
    with pytest.raises(ValueError, match="--data-path b: token ids from 2.* in a batch"):
        Sampler(sampler.dataset, 1500, "").batch(0, 64, 4)


def test_documents_of_a_blend_keep_to_themselves(tmp_path):
    """--reset-attention-mask: rows of any dataset are numbered by their own ends of documents."""
    write_dataset(tmp_path / "a")
    write_dataset(tmp_path / "b", base=2000)
    blend = train_set(settings_of(1, tmp_path / "a", 1, tmp_path / "b"), 32)
    batch = Sampler(blend, 10_000, "", eod=EOD).batch(0, 32, 4)
    for tokens, documents in zip(batch.tokens_BS.tolist(), batch.documents_BS.tolist()):
        assert documents == [tokens[:place].count(EOD) for place in range(SEQ)]
    assert batch.documents_BS.max() == 1  # the shortest document has four tokens, a row eight


def parsed(*given):
    parser = argparse.ArgumentParser()
    add_data(parser)
    args = parser.parse_args([*map(str, given), "--tokenizer-type", "NullTokenizer", "--tokenizer-model", str(EOD)])
    path, own = data_paths(args)
    return settings_of(*path, split_data_paths=own, data_arguments=data_arguments(args))


def test_a_file_of_prefixes_may_have_comments(tmp_path):
    file = tmp_path / "blend.txt"
    file.write_text(f"# the web\n0.7 {tmp_path}/a#1  # without pages\n\n  #0.2 old\n0.3 {tmp_path}/b #\n")
    assert parsed("--data-args-path", file).data_path == ("0.7", f"{tmp_path}/a#1", "0.3", f"{tmp_path}/b")
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match=f"--data-args-path {file} is empty"):
        parsed("--data-args-path", file)


def test_refusals_name_the_argument_that_was_given(tmp_path):
    text, splits = tmp_path / "blend.txt", tmp_path / "splits.json"
    for content, why in (("0.7 a 0.3", "0.7 a 0.3: weights and prefixes must take turns"),
                         ("nowhere", "nowhere: nowhere.idx does not exist"),
                         (str(tmp_path), f"{tmp_path}: {tmp_path}.idx does not exist: {tmp_path} is a directory, and")):
        text.write_text(content)
        splits.write_text(json.dumps({"train": content}))
        for given, name in ((("--data-args-path", text), f"--data-args-path {text}:"),
                            (("--per-split-data-args-path", splits), f"--per-split-data-args-path {splits}, train:"),
                            (("--train-data-path", *content.split()), "--train-data-path"),
                            (("--data-path", *content.split()), "--data-path")):
            with pytest.raises(ValueError) as caught:
                check_data(parsed(*given), 1000)
            assert str(caught.value).startswith(f"{name} {why}")


def test_a_directory_is_told_the_datasets_in_it(tmp_path):
    write_dataset(tmp_path / "a")
    with pytest.raises(ValueError, match=f"{tmp_path} is a directory, and the datasets in it are {tmp_path}/a$"):
        check_data(settings_of(tmp_path), 1000)
    with pytest.raises(ValueError, match=f"{tmp_path}/ is a directory, and the datasets in it are {tmp_path}/a$"):
        check_data(settings_of(f"{tmp_path}/"), 1000)


def test_short_names():
    assert short_names(["/x/wiki/a_text", "/x/code/a_text"]) == ("wiki/a_text", "code/a_text")
    assert short_names(["/x/web1", "/x/web2", "/x/web1"]) == ("web1", "web2", "web1#2")
    assert short_names(["a", "/x/a"]) == ("a", "/x/a") and short_names(["x/a"]) == ("a",)


def test_a_longer_index_of_a_blend_serves_a_shorter_run(tmp_path):
    for name in "ab":
        write_dataset(tmp_path / name)
    settings = settings_of(1, tmp_path / "a", 2, tmp_path / "b")
    long = [sample["source"] for sample in map(train_set(settings, 90).__getitem__, range(50))]
    assert [sample["source"] for sample in map(train_set(settings, 50).__getitem__, range(50))] == long
    assert [path.name[-9:] for path in (tmp_path / "cache").glob("*.blend")] == ["-90.blend"]


def test_the_table_of_a_blend_worked_by_hand():
    sources = tuple(PackedSplit(f"/x/{name}", "", 0, 1, tokens, 10, 0) for name, tokens in (("a", 401), ("b", 101)))
    head, columns, *rows = describe_split("train", SplitPlan(sources, (0.5, 0.5), 100))
    assert head == "train data: 2 datasets of 502 tokens; 100 samples of 10 tokens are 2.00 epochs"
    assert columns.split() == ["dataset", "tokens", "of", "tokens", "weight", "samples", "epochs"]
    assert [row.split() for row in rows] == [["a", "401", "79.880%", "50.000%", "50", "1.250"],
                                             ["b", "101", "20.120%", "50.000%", "50", "5.000"]]
    assert describe_split("train", SplitPlan(sources, (0.4, 0.6), 100), 1)[2:] == [
        f"  {'b':7}  {101:>17}  {'20.120%':>9}  {'60.000%':>8}  {60:>13}  {'6.000':>9}",
        "  and 1 dataset more, of weight 40.000% together"]
    assert len(describe_split("train", SplitPlan(sources[:1], (1.0,), 100))) == 1


def test_blend_without_weights_is_by_tokens(tmp_path):
    a, b = (sum(map(len, write_dataset(tmp_path / name, count, base)))
            for name, count, base in (("a", 60, 0), ("b", 20, 2000)))
    dataset = train_set(settings_of(tmp_path / "a", tmp_path / "b"), 400)
    from_a = sum(max(tokens) < 2000 for tokens in tokens_of(dataset, 400))
    assert abs(from_a - 400 * a / (a + b)) <= 1


@pytest.mark.parametrize("data_path, message", [
    ((), "--data-path is missing"),
    (("0.3", "a", "0.7"), "--data-path 0.3 a 0.7: weights and prefixes must take turns, but there are 3 entries"),
    (("0.3", "a", "O.7", "b"), "but 'O.7' is no number"),
    (("-1", "a"), "the weight -1 is not greater than 0"),
    (("inf", "a"), "the weight inf is not greater than 0 and finite"),
])
def test_bad_blends_are_refused(data_path, message):
    with pytest.raises(ValueError, match=message):
        parse_blend(data_path)
