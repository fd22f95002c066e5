"""Pre-training data: the order of samples against one worked out from numpy's shuffles and megatron-core's; ranks."""

import dataclasses
import gc
import itertools
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import EOD, SEQ, settings_of, tokens_of, train_set, write_dataset

from megatron_deepseek.data import sample_index, survey
from megatron_deepseek.data.samples import PackedSamples
from megatron_deepseek.data.batches import Sampler, read_ahead, sample_indices
from megatron_deepseek.data.index_file import HEADER, MAGIC
from megatron_deepseek.data.indexed import IndexedWriter, open_indexed
from megatron_deepseek.data.pretraining import build_datasets, check_data, make_plan


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


def test_processes_build_what_one_builds(tmp_path, monkeypatch):
    for number in range(5):
        write_dataset(tmp_path / f"{number}", 10 + 9 * number, seed=number)
    settings = settings_of(*(tmp_path / str(number) for number in range(5)), split="50,50,0")
    train_set(settings, 9)
    alone = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("*.samples")}
    monkeypatch.setattr(sample_index, "FEW_SEQUENCES", 0)
    plan = make_plan(dataclasses.replace(settings, data_cache_path=str(tmp_path / "other")), (9, 0, 0))
    built = []
    plan.build(plan.missing(), workers=2, built=built.append)
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").glob("*.samples")} == alone
    assert sorted(split.prefix for split in built) == [str(tmp_path / str(number)) for number in range(5)]
    (tmp_path / "3.idx").unlink()
    third = tmp_path / "third"
    third.mkdir()
    plan = dataclasses.replace(plan, folder=third)
    with pytest.raises(ValueError, match="dataset .*/3: .*3.idx does not exist"):
        plan.build(plan.missing(), workers=2)
    monkeypatch.setattr(sample_index.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="the process that indexes .*/[0-9] in .*/third ended with status 1"):
        plan.build(plan.missing(), workers=2)
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
        assert torch.equal(batch.weights_BS, 1.0 - ((batch.tokens_BS == EOD) & asked).float())


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


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_as_many_are_read_ahead_as_there_are_workers(num_workers):
    """One is being worked on, and each worker is at one that follows; the order is that of the requests."""
    asked, started = [], threading.Semaphore(0)

    def read(number):
        started.release()
        return number, threading.current_thread() is threading.main_thread()

    def requests():
        for number in range(6):
            asked.append(number)
            yield (number,)

    ahead = read_ahead(read, requests(), num_workers)
    assert next(ahead) == (0, num_workers == 0)
    for _ in range(1 + num_workers):
        assert started.acquire(timeout=10)
    assert asked == list(range(1 + num_workers))
    assert [number for number, _ in ahead] == list(range(1, 6))


class ReadAtOnce(PackedSamples):
    """As if another thread, which reads another epoch, had come right after this one has its epoch's order."""

    def __setattr__(self, name, value):
        super().__setattr__(name, (99, value[1][::-1]) if name == "_order" and value[0] else value)


def test_epochs_read_by_several_threads_keep_their_orders(tmp_path):
    write_dataset(tmp_path / "data")
    dataset = train_set(settings_of(tmp_path / "data"), 64)
    alone = [dataset[dataset.samples_per_epoch + k]["tokens"].tolist() for k in range(4)]
    dataset = ReadAtOnce(dataset.split, dataset.folder, 64)
    assert [dataset[dataset.samples_per_epoch + k]["tokens"].tolist() for k in range(4)] == alone


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
        plan, refusal = objects[0]
        objects[0] = dataclasses.replace(plan, folder=folder), refusal
    torch.distributed.broadcast_object_list = broadcast_moved


def build_on_rank(rank, settings, folder, queue, own_folder):
    gc.freeze()  # groups of other tests, whose threads are not in this process
    os.environ["LOCAL_RANK"] = "0" if own_folder else str(rank)
    if rank == 1 and own_folder:
        move_plan(own_folder)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        sampler = Sampler(train_set(settings, 16), 10_000, "")
        queue.put((rank, sampler.batch(0, 16, 2, rank, 2).tokens_BS.tolist()))
    except ValueError as error:
        queue.put((rank, str(error)))
    torch.distributed.destroy_process_group()


def read_on_two_ranks(settings, folder, own_folder) -> dict:
    """What each rank reads, or the refusal that it ends with; rank 1 has a folder of its own, if any."""
    fork = multiprocessing.get_context("fork")  # torch is imported already: a fresh process takes seconds for it
    queue = fork.Queue()
    ranks = [fork.Process(target=build_on_rank, args=(rank, settings, folder, queue, own_folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    read = dict(queue.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    return read


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_read_by_the_indices_that_rank_0_builds_or_by_their_nodes_own(tmp_path, shared):
    write_dataset(tmp_path / "a")
    write_dataset(tmp_path / "b", base=2000)
    settings = settings_of(1, tmp_path / "a", 2, tmp_path / "b")
    read = read_on_two_ranks(settings, tmp_path, None if shared else tmp_path / "other" / "new")
    assert len(list(tmp_path.glob("other/new/*"))) == (0 if shared else 2)  # both datasets have the same lengths
    alone = Sampler(train_set(settings, 16), 10_000, "")
    assert read == {rank: alone.batch(0, 16, 2, rank, 2).tokens_BS.tolist() for rank in range(2)}


@pytest.mark.parametrize("own_folder", ["a.idx/nowhere", None])
def test_every_rank_is_told_where_one_cannot_build(tmp_path, own_folder):
    """Rank 1, of a node of its own, or rank 0 for all: nobody waits for it in vain."""
    write_dataset(tmp_path / "a")
    settings = settings_of(tmp_path / "a", data_cache_path=None if own_folder else "/dev/null/cache")
    read = read_on_two_ranks(settings, tmp_path, own_folder and tmp_path / own_folder)
    assert read[0] == read[1] and ("/nowhere/" in read[0] if own_folder else "--data-cache-path /dev/null" in read[0])
