"""Pre-training data: the order of samples against one worked out from numpy's shuffles, blends, refusals, ranks."""

import dataclasses
import itertools
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_deepseek.data import sample_index, survey
from megatron_deepseek.data.batches import Sampler, read_ahead, sample_indices
from megatron_deepseek.data.blend import parse_blend, parse_split, short_names
from megatron_deepseek.data.index_file import HEADER, MAGIC
from megatron_deepseek.data.indexed import IndexedWriter, open_indexed
from megatron_deepseek.data.pretraining import (
    SplitPlan, build_datasets, check_data, check_token_ids, make_plan)
from megatron_deepseek.data.sample_index import PackedSplit
from megatron_deepseek.data.table import describe_split
from megatron_deepseek.settings import DataSettings

SEQ = 8
EOD = 999


def write_dataset(prefix, num_documents=40, base=0, dtype="<u2", seed=0):
    """Documents of 3 to 30 ids that count up through the dataset from `base`, each with its EOD: no id is twice."""
    lengths = np.random.default_rng(seed).integers(3, 30, num_documents)
    ids = np.split(base + np.arange(lengths.sum()), np.cumsum(lengths)[:-1])
    documents = [np.append(part, EOD).astype(dtype) for part in ids]
    writer = IndexedWriter(str(prefix), dtype)
    writer.add(np.concatenate(documents), [[len(document)] for document in documents])
    writer.finish()
    writer.publish()
    return documents


def settings_of(*data_path, **changes):
    values = {"seq_length": SEQ, "split": "1,0,0", "tokenizer_type": "NullTokenizer", "tokenizer_model": str(EOD)}
    return DataSettings(tuple(map(str, data_path)), **(values | changes))


def train_set(settings, num_samples):
    return build_datasets(settings, (num_samples, 0, 0))[0]


def tokens_of(dataset, count=None):
    return [dataset[index]["tokens"].tolist() for index in range(count or len(dataset))]


def test_first_epoch_is_megatrons_order(tmp_path):
    """Documents shuffled, laid end to end, cut every SEQ tokens, samples shuffled: one RandomState(seed) for both."""
    documents = write_dataset(tmp_path / "data")
    random = np.random.RandomState(1234)
    order = np.arange(len(documents))
    random.shuffle(order)
    stream = np.concatenate([documents[index] for index in order])
    places = np.arange((len(stream) - 1) // SEQ)
    random.shuffle(places)
    dataset = train_set(settings_of(tmp_path / "data"), len(places))
    assert len(dataset) == len(places)
    for place, sample in zip(places, (dataset[index] for index in range(len(places))), strict=True):
        assert sample["tokens"].tolist() == stream[place * SEQ:(place + 1) * SEQ].tolist()
        assert sample["labels"].tolist() == stream[place * SEQ + 1:(place + 1) * SEQ + 1].tolist()


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def megatrons(settings, num_samples, blend):
    """megatron-core's own datasets, each of one epoch, for (train, valid, test)."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class OneEpoch(GPTDataset):
        def __init__(self, indexed_dataset, dataset_path, indices, num_samples, index_split, config):
            super().__init__(indexed_dataset, dataset_path, indices, None, index_split, config)

    class Tokenizer:
        eod, vocab_size, unique_identifiers = EOD, None, {}

    config = GPTDatasetConfig(
        random_seed=settings.seed, sequence_length=settings.seq_length, blend=blend, split=settings.split,
        tokenizer=Tokenizer, mid_level_dataset_surplus=1.0, reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=settings.eod_mask_loss, create_attention_mask=False,
        path_to_cache=str(Path(blend[0][0]).parent / "theirs"))
    return BlendedMegatronDatasetBuilder(OneEpoch, num_samples, lambda: True, config).build()


def test_every_sample_of_an_epoch_is_megatrons(tmp_path, process_group):
    """Single and blended, train and valid, with and without a mask; documents of many samples and of no tokens too."""
    for number in range(5):
        write_dataset(tmp_path / f"{number}", 30 + 10 * number, base=1000 * number, seed=number)
    writer = IndexedWriter(str(tmp_path / "odd"), "<u2")
    writer.add(np.arange(700, dtype="<u2"), [[0], [300], [1, 0, 8], [], [0], [391], [0]])
    writer.finish()
    writer.publish()
    prefixes = [str(tmp_path / str(number)) for number in range(5)]
    weights = [0.1, 3.3, 1 / 3, 0.7, 1.1]
    for paths, blend, num_samples in (
            (prefixes[:1], (prefixes[:1], None), (50, 9, 0)),
            ([tmp_path / "odd"], ([str(tmp_path / "odd")], None), (9, 1, 0)),
            ([part for pair in zip(weights, prefixes) for part in pair], (prefixes, weights), (100, 10, 0))):
        for masked in (False, True):
            settings = settings_of(*paths, split="80,20,0", eod_mask_loss=masked)
            ours, theirs = build_datasets(settings, num_samples), megatrons(settings, num_samples, blend)
            for mine, reference, count in zip(ours[:2], theirs, num_samples):
                for index in range(min(count, len(reference))):
                    sample, expected = mine[index], reference[index]
                    assert torch.equal(sample["tokens"], expected["tokens"]), (paths, index)
                    assert torch.equal(sample["labels"], expected["labels"])
                    assert torch.equal(sample["loss_mask"], expected["loss_mask"] > 0)
                    assert sample["source"] == expected.get("dataset_id", 0)


def test_order_is_the_same_however_many_samples_are_asked_for(tmp_path):
    write_dataset(tmp_path / "data")
    few = train_set(settings_of(tmp_path / "data"), 1)
    many = train_set(settings_of(tmp_path / "data"), 3 * len(few) + 1)
    epochs = np.array(tokens_of(many)).reshape(4, len(few), SEQ)
    assert len(many) == 4 * len(few) and tokens_of(few) == epochs[0].tolist()
    assert len({tuple(epoch[:, 0]) for epoch in epochs}) == 4, "each epoch has an order of its own"
    assert len({tuple(sorted(map(tuple, epoch.tolist()))) for epoch in epochs}) == 1, "and the same samples"
    assert tokens_of(train_set(settings_of(tmp_path / "data", seed=1), 1)) != tokens_of(few)


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


def test_processes_build_what_one_builds(tmp_path, monkeypatch):
    for number in range(5):
        write_dataset(tmp_path / f"{number}", 10 + 9 * number, seed=number)
    settings = settings_of(*(tmp_path / str(number) for number in range(5)), split="50,50,0")
    train_set(settings, 9)
    alone = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("*.samples")}
    monkeypatch.setattr(sample_index, "FEW_SEQUENCES", 0)
    plan = make_plan(dataclasses.replace(settings, data_cache_path=str(tmp_path / "other")), (9, 0, 0))
    built = []
    plan.build(workers=2, built=built.append)
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").glob("*.samples")} == alone
    assert sorted(split.prefix for split in built) == [str(tmp_path / str(number)) for number in range(5)]
    (tmp_path / "3.idx").unlink()
    third = tmp_path / "third"
    third.mkdir()
    with pytest.raises(RuntimeError, match="the process that indexes .*/[0-9] in .*/third failed, with status 1"):
        dataclasses.replace(plan, folder=third).build(workers=2)
    assert not list(third.glob("*.tmp"))


def test_a_survey_is_made_once(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data")
    check_data(settings_of(tmp_path / "data"), 1000)
    reads = []
    monkeypatch.setattr(survey, "open_indexed", lambda *args: reads.append(args) or open_indexed(*args))
    check_data(settings_of(tmp_path / "data"), 1000)
    assert not reads
    with open(tmp_path / "data.bin", "r+b") as file:
        file.write(b"\xff\xff")
    os.utime(tmp_path / "data.bin", ns=(1, 1))
    with pytest.raises(ValueError, match="token ids from 1 to 65535 in"):
        check_data(settings_of(tmp_path / "data"), 1000)
    assert len(reads) == 1


def test_sequences_that_do_not_lie_in_order(tmp_path):
    """Nobody writes such files any more, but the format allows them, and megatron-core reads them."""
    lengths, ids = np.array([10, 20, 30], "<i4"), np.arange(60, dtype="<u2")
    pointers = np.array([100, 60, 0], "<i8")  # the first behind the second, behind the third
    header = HEADER.pack(MAGIC, 1, 8, 3, 4)
    (tmp_path / "data.bin").write_bytes(ids.tobytes())
    (tmp_path / "data.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes()
                                        + np.arange(4, dtype="<i8").tobytes())
    found, = survey.survey_all([str(tmp_path / "data")], "--data-path", tmp_path)
    assert not found.contiguous
    assert [found.tokens_between(*bounds) for bounds in ((0, 1), (1, 3), (0, 3), (2, 2))] == [10, 50, 60, 0]
    dataset = train_set(settings_of(tmp_path / "data", split="34,0,66"), 1)
    assert tokens_of(dataset) == [list(range(50, 50 + SEQ))]


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


def test_splits_do_not_overlap_and_an_empty_one_is_no_trouble(tmp_path):
    documents = write_dataset(tmp_path / "data")
    settings = settings_of(tmp_path / "data", split="75,24.99,0.01")
    train, valid, test = build_datasets(settings, (50, 20, 0))
    held_out = set(np.concatenate(documents[30:])) - {EOD}
    seen = [set(itertools.chain.from_iterable(tokens_of(split))) - {EOD} for split in (train, valid)]
    assert not seen[0] & held_out and seen[1] <= held_out and test is None


def test_end_of_document_masks_its_own_place_on_request(tmp_path):
    write_dataset(tmp_path / "data")
    for asked in (False, True):
        batch = Sampler(train_set(settings_of(tmp_path / "data", eod_mask_loss=asked), 8), 1000, "").batch(0, 8, 2)
        assert batch.loss_mask_BS.dtype == torch.bool and batch.num_micro_batches == 4
        assert torch.equal(~batch.loss_mask_BS, (batch.tokens_BS == EOD) & asked)


def test_samples_of_each_rank_worked_by_hand():
    assert sample_indices(8, 8, 2, dp_rank=0, dp_size=2) == [8, 9, 12, 13]
    assert sample_indices(8, 8, 2, dp_rank=1, dp_size=2) == [10, 11, 14, 15]
    assert sample_indices(8, 8, 4, dp_rank=0, dp_size=1) == list(range(8, 16))
    with pytest.raises(ValueError, match="--global-batch-size 8 is not a multiple of --micro-batch-size 3 x 2 data"):
        sample_indices(8, 8, 3, 0, 2)


def test_two_ranks_read_what_one_reads(tmp_path):
    write_dataset(tmp_path / "data")
    sampler = Sampler(train_set(settings_of(tmp_path / "data"), 64), 1000, "")
    batch = sampler.batch(32, 16, 8)
    whole = batch.tokens_BS
    assert torch.equal(batch.labels_BS[:, :-1], whole[:, 1:])
    shares = [sampler.batch(32, 16, 4, rank, 2).tokens_BS.reshape(2, 4, SEQ) for rank in range(2)]
    assert torch.equal(torch.stack(shares, dim=1).reshape(16, SEQ), whole)
    evaluations = [[batch.tokens_BS for batch in sampler.evaluation(2, 16, 8)] for _ in range(2)]
    assert torch.equal(torch.cat(evaluations[0]), torch.cat(evaluations[1]))
    assert torch.equal(evaluations[0][1], sampler.batch(16, 16, 8).tokens_BS)


def test_read_ahead_keeps_order_raises_in_turn_and_leaves_no_thread():
    read = []

    def invert(number):
        read.append(number)
        return 1 / number
    ahead = read_ahead(invert, ((number,) for number in (1, 2, 0, 4)))
    assert [next(ahead), next(ahead)] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(ahead)
    ahead.close()
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    assert read == [1, 2, 0, 4]


def test_data_made_anew_gets_new_indices_and_broken_ones_are_rebuilt(tmp_path):
    write_dataset(tmp_path / "data")
    settings = settings_of(tmp_path / "data")
    first = tokens_of(train_set(settings, 1))
    index, = (tmp_path / "cache").glob("*.samples")
    changed = index.stat().st_mtime_ns
    assert tokens_of(train_set(settings, 5)) == first and index.stat().st_mtime_ns == changed, "not built again"
    index.write_bytes(index.read_bytes()[:-8])
    assert tokens_of(train_set(settings, 1)) == first
    documents = write_dataset(tmp_path / "data", seed=1)
    assert len(train_set(settings, 1)) == (sum(map(len, documents)) - 1) // SEQ != len(first)


def move_plan(folder):
    """What this process is told from now on names another folder: as if it could not see the one of rank 0."""
    broadcast = torch.distributed.broadcast_object_list

    def broadcast_moved(objects):
        broadcast(objects)
        objects[0] = dataclasses.replace(objects[0], folder=folder)
    torch.distributed.broadcast_object_list = broadcast_moved


def build_on_rank(rank, settings, folder, queue, own_folder):
    os.environ["LOCAL_RANK"] = "0" if own_folder else str(rank)
    if rank == 1 and own_folder:
        move_plan(own_folder)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sampler = Sampler(train_set(settings, 16), 10_000, "")
    queue.put((rank, sampler.batch(0, 16, 2, rank, 2).tokens_BS.tolist()))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_read_by_the_indices_that_rank_0_builds_or_by_their_nodes_own(tmp_path, shared):
    write_dataset(tmp_path / "a")
    write_dataset(tmp_path / "b", base=2000)
    settings = settings_of(1, tmp_path / "a", 2, tmp_path / "b")
    fork = multiprocessing.get_context("fork")  # torch is imported already: a fresh process takes seconds for it
    queue = fork.Queue()
    own_folder = None if shared else tmp_path / "other"
    (tmp_path / "other").mkdir()
    given = (settings, tmp_path, queue, own_folder)
    ranks = [fork.Process(target=build_on_rank, args=(rank, *given)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    read = dict(queue.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    assert len(list((tmp_path / "other").iterdir())) == (0 if shared else 2)  # both datasets have the same lengths
    alone = Sampler(train_set(settings, 16), 10_000, "")
    assert read == {rank: alone.batch(0, 16, 2, rank, 2).tokens_BS.tolist() for rank in range(2)}


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


@pytest.mark.parametrize("split", ["", "a,b", "1,1,1,1", "-1,2,0", "0,0,0", "nan,1", "1;1"])
def test_bad_splits_are_refused(split):
    with pytest.raises(ValueError, match=f"--split {split}: "):
        parse_split(split)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    r"data.idx does not exist": lambda bin, idx: idx.unlink(),
    r"data.bin does not exist": lambda bin, idx: bin.unlink(),
    r"data.bin is truncated: 100 bytes, where .*data.idx points at \d+": lambda bin, idx: cut(bin, 100),
    r"data.idx is truncated: 200 bytes, 842 for its 40 sequences": lambda bin, idx: cut(idx, 200),
    r"data.idx is truncated: 20 bytes, its header alone has 34": lambda bin, idx: cut(idx, 20),
    r"data.idx is no index of this format: it begins with b''": lambda bin, idx: cut(idx, 0),
    r"data.idx is no index of this format: it begins with b'\{": lambda bin, idx: idx.write_bytes(b'{"text": 1}'),
    r"data.idx has version 2": lambda bin, idx: idx.write_bytes(idx.read_bytes().replace(b"\1", b"\2", 1)),
    r"data.idx has dtype code 7": lambda bin, idx: idx.write_bytes(idx.read_bytes().replace(b"\x08", b"\x07", 1)),
    r"data.idx is damaged: 852 bytes, 842": lambda bin, idx: idx.write_bytes(idx.read_bytes() + bytes(10)),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_files_are_refused(tmp_path, message):
    write_dataset(tmp_path / "data")
    DAMAGE[message](tmp_path / "data.bin", tmp_path / "data.idx")
    with pytest.raises(ValueError, match=rf"--data-path {tmp_path}/data: .*{message}") as caught:
        check_data(settings_of(tmp_path / "data"), 1000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, vocab_size, num_samples, message", [
    ({"tokenizer_model": "1000"}, 1000, (1, 0, 0),
     "--tokenizer-model 1000: its vocabulary of 1001 is larger than the model's vocab_size 1000"),
    ({"tokenizer_model": "10"}, 999, (1, 0, 0), "token ids from 0 to 999 in .*outside the model's vocab_size 999"),
    ({"seq_length": 0}, 1000, (1, 0, 0), "--seq-length 0: it must be at least 1"),
    ({"seq_length": 10_000}, 1000, (1, 0, 0), "its train split .* too small for one sample of --seq-length 10000"),
    ({"split": "1,0,0"}, 1000, (1, 1, 0), r"its valid split \(--split 1,0,0: 0 of 40 sequences, 0 tokens\) is too sm"),
    ({"split": "99,1,0"}, 1000, (1, 1, 0), r"its valid split \(--split 99,1,0: 0 of 40 sequences, 0 tokens\) is too"),
    ({"data_cache_path": "/dev/null"}, 1000, (1, 0, 0), "--data-cache-path /dev/null: cannot write indices"),
])
def test_data_that_does_not_fit_is_refused(tmp_path, changes, vocab_size, num_samples, message):
    write_dataset(tmp_path / "data")
    check_data(settings_of(tmp_path / "data"), 1000)
    with pytest.raises(ValueError, match=message):
        check_data(settings_of(tmp_path / "data", **changes), vocab_size, num_samples)


def test_the_smallest_dataset_is_one_sample_and_one_token(tmp_path):
    for tokens, fits in ((0, False), (SEQ, False), (SEQ + 1, True)):
        writer = IndexedWriter(str(tmp_path / "data"), "<u2")
        writer.add(np.arange(tokens, dtype="<u2"), [[tokens]] if tokens else [[]])
        writer.finish()
        writer.publish()
        if fits:
            check_data(settings_of(tmp_path / "data"), 1000)
            assert tokens_of(train_set(settings_of(tmp_path / "data"), 2)) == [list(range(SEQ))] * 2
        else:
            with pytest.raises(ValueError, match="too small for one sample" if tokens else "holds no sequences"):
                check_data(settings_of(tmp_path / "data"), 1000)


def test_negative_ids_are_refused_and_batches_are_checked(tmp_path):
    write_dataset(tmp_path / "data", base=-1, dtype="<i4")
    with pytest.raises(ValueError, match="token ids from -1 to 999 in"):
        check_data(settings_of(tmp_path / "data"), 1000)
    with pytest.raises(ValueError, match="--data-path x: token ids from 0 to 5 in a batch, outside .*vocab_size 5"):
        check_token_ids(torch.tensor([0, 5]), 5, "x")
