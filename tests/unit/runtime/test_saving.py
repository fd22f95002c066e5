"""Saves of a run on one rank: in the foreground and the background, on a disk that is full for a while, and resumed."""

import errno
import io
import json
import os
import shutil
from collections import namedtuple
from concurrent.futures import wait
from dataclasses import asdict, replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from small_models import V3_SMALL, random_batch, training_batch, weights_of, whole_stage

from megatron_deepseek.checkpoint.dcp import storage_writer as writer
from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.verification import verify
from megatron_deepseek.checkpoint.job.export import keep_assets
from megatron_deepseek.checkpoint.loadable import check_checkpoint
from megatron_deepseek.checkpoint.tracker import TRACKER, find_iteration, iterations, last_iteration
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.runtime import saving
from megatron_deepseek.runtime.report import ProgressLines, Report
from megatron_deepseek.runtime.save_lock import Holder, SaveLock
from megatron_deepseek.runtime.saving import Saver, TakenOver
from megatron_deepseek.settings import RunSettings
from megatron_deepseek.training.trainer import TrainingSpec, Trainer

SEQ_LENGTH = 6
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def trainer(meshes) -> Trainer:
    return Trainer(TrainingSpec(V3_SMALL, (whole_stage(V3_SMALL),), "1F1B", SEQ_LENGTH, 2), meshes)


def make_saver(trainer, root, **settings) -> tuple[Saver, io.StringIO]:
    run, told = RunSettings(100, save=root, **settings), io.StringIO()
    return Saver(run, V3_SMALL, trainer, Report(ProgressLines(run, 0, told)), None), told


def step(trainer: Trainer, seed: int) -> None:
    trainer.train_step(training_batch(*random_batch(V3_SMALL, 2, SEQ_LENGTH, seed)), learning_rate=1e-2)


@pytest.mark.parametrize("async_save", [False, True])
def test_saves_once_tells_and_counts_the_stall(trainer, tmp_path, async_save):
    saver, told = make_saver(trainer, tmp_path, async_save=async_save, keep_last=2)
    assert saver.take_stall() is None
    for iteration in (1, 2, 3):
        step(trainer, iteration)
        saver.save(TrainState(iteration, 2 * iteration, iteration))
        saver.save(TrainState(iteration, 2 * iteration, iteration))  # as at the end of a run that just saved
        saver.poll()
        assert saver.take_stall() > 0 and saver.take_stall() is None
    saver.close()
    assert iterations(tmp_path) == [2, 3] and told.getvalue().count("saved ") == 3
    assert f"saved {tmp_path}/iter_0000003 in" in told.getvalue()


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_was_full_for_a_while(trainer, tmp_path, monkeypatch, async_save):
    """Training goes on without that checkpoint; the message has path and bytes; the next save is as if nothing was."""
    saver, told = make_saver(trainer, tmp_path, async_save=async_save)
    saver.save(TrainState(1, 0, 0))
    with monkeypatch.context() as patch:
        saver.finish()
        patch.setattr(writer.shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 1234))
        saver.save(TrainState(2, 0, 0))
        saver.finish()
    assert f"iteration 2 is NOT saved: {tmp_path}: no room" in told.getvalue() and "1,234 are free" in told.getvalue()
    assert f"; {tmp_path}/iter_0000001 is as it was. The next save tries again" in told.getvalue()
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"] and last_iteration(tmp_path) == 1
    saver.save(TrainState(3, 0, 0))
    saver.close()
    assert iterations(tmp_path) == [1, 3] and last_iteration(tmp_path) == 3


def test_a_thousand_ranks_ask_for_their_chunks():
    """V3's stacked experts of a layer, sharded over 1,024 ranks, and a router that one of them writes."""
    ranks, shape = 1024, torch.Size((256, 4096, 7168))
    chunk = torch.Size((1, 1024, 7168))
    whole, properties = torch.Size((256, 7168)), TensorProperties(dtype=torch.float32)
    plans = [SavePlan([WriteItem(MetadataIndex("experts", torch.Size((rank // 4, rank % 4 * 1024, 0))),
                                 WriteItemType.SHARD, tensor_data=TensorWriteData(
                                     ChunkStorageMetadata(torch.Size((rank // 4, rank % 4 * 1024, 0)), chunk),
                                     properties, shape))]) for rank in range(ranks)]
    plans[7].items.append(WriteItem(MetadataIndex("router"), WriteItemType.TENSOR, tensor_data=TensorWriteData(
        ChunkStorageMetadata(torch.Size((0, 0)), whole), properties, whole)))
    nbytes = 4 * (shape.numel() + whole.numel())
    assert nbytes < writer.bytes_of(plans) < 1.001 * nbytes


@pytest.mark.parametrize("async_save", [False, True])
def test_what_found_no_room_is_saved_when_asked_again(trainer, tmp_path, monkeypatch, async_save):
    """As the last step of a run is: once when it is due, once at the end."""
    saver, _ = make_saver(trainer, tmp_path, async_save=async_save)
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 0))
        saver.save(TrainState(1, 0, 0))
        saver.finish()
    saver.save(TrainState(1, 0, 0))
    saver.close()
    assert iterations(tmp_path) == [1]


def test_a_last_save_that_fails_in_the_background_is_tried_again(trainer, tmp_path, monkeypatch):
    """On all ranks, though one knows of the failure by then and another does not."""
    saver, told = make_saver(trainer, tmp_path, async_save=True)
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 0))
        saver.save(TrainState(1, 0, 0))  # due
        wait([saver.pending.future])
    saver.save(TrainState(1, 0, 0))  # the end of the run
    saver.close()
    assert "iteration 1 is NOT saved" in told.getvalue() and iterations(tmp_path) == [1]


def test_two_saves_between_two_reports_add_up_their_stalls(trainer, tmp_path, monkeypatch):
    saver, _ = make_saver(trainer, tmp_path)
    monkeypatch.setattr(saving, "time", SimpleNamespace(perf_counter=count().__next__))
    saver.save(TrainState(1, 0, 0))
    one = saver.take_stall()
    saver.save(TrainState(2, 0, 0))
    saver.save(TrainState(3, 0, 0))
    assert saver.take_stall() == 2 * one > 0


def test_a_run_that_ends_without_its_last_checkpoint_fails(trainer, tmp_path, monkeypatch):
    saver, _ = make_saver(trainer, tmp_path, async_save=True)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 0))
    saver.save(TrainState(1, 0, 0))
    with pytest.raises(OSError, match="no room for a checkpoint"):
        saver.close()


@pytest.mark.parametrize("async_save", [False, True])
def test_what_the_file_system_refuses_is_tried_again(trainer, tmp_path, async_save):
    """The parent of --save is a file for a while: a line, no checkpoint; then one, as if nothing had been."""
    (tmp_path / "file").write_text("")
    saver, told = make_saver(trainer, tmp_path / "file" / "run", async_save=async_save)
    saver.save(TrainState(1, 0, 0))
    saver.finish()
    assert "iteration 1 is NOT saved: " in told.getvalue() and "Not a directory" in told.getvalue()
    assert "; there is no checkpoint before it. The next save tries again" in told.getvalue()
    (tmp_path / "file").unlink()
    saver.save(TrainState(2, 0, 0))
    saver.close()
    assert iterations(tmp_path / "file" / "run") == [2]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_mistake_of_the_program_ends_the_run(trainer, tmp_path, monkeypatch, async_save):
    saver, _ = make_saver(trainer, tmp_path, async_save=async_save)
    monkeypatch.setattr(writer, "checksum_directory", lambda *_: {}["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        saver.save(TrainState(1, 0, 0))
        saver.finish()


@pytest.mark.parametrize("async_save", [False, True])
def test_a_checkpoint_without_the_marker_is_not_called_lost(trainer, tmp_path, monkeypatch, async_save):
    """What cannot be written is the tracker alone: said so, with what loading takes, and tried again."""
    saver, told = make_saver(trainer, tmp_path, async_save=async_save)
    saver.save(TrainState(1, 0, 0))
    saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target, replace=os.replace: (
            full_disk() if target == tmp_path / TRACKER else replace(source, target)))
        saver.save(TrainState(2, 0, 0))
        saver.finish()
    assert (f"iteration 2 is saved, but not named as the last one: {tmp_path}/{TRACKER}: No space left on device; "
            f"{tmp_path}/iter_0000002 is whole, but loading takes {tmp_path}/iter_0000001 unless --ckpt-step is given. "
            "The next save tries again") in told.getvalue()
    assert "NOT saved" not in told.getvalue() and iterations(tmp_path) == [1, 2] and last_iteration(tmp_path) == 1
    assert check_checkpoint(tmp_path, V3_SMALL) == find_iteration(tmp_path, 1)
    assert check_checkpoint(tmp_path, V3_SMALL, step=2) == find_iteration(tmp_path, 2)
    saver.save(TrainState(2, 0, 0))
    saver.close()
    assert last_iteration(tmp_path) == 2


def test_what_stays_is_what_loading_takes(trainer, tmp_path, monkeypatch):
    """After going back, which leaves newer ones of another past there."""
    saver, told = make_saver(trainer, tmp_path)
    for iteration in (5, 1):
        saver.save(TrainState(iteration, 0, 0))
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 0))
    saver.save(TrainState(2, 0, 0))
    assert f"; {tmp_path}/iter_0000001 is as it was. The next save tries again" in told.getvalue()


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("moment", ["save", "begin", "await_files", "check_sizes"])
def test_a_directory_that_became_anothers_meanwhile(trainer, tmp_path, monkeypatch, async_save, moment):
    """This run was suspended before a save, before it wrote to its files, before it saw to all of them, or right before
    they are published: nothing of it is seen, and what the other writes under the same name is as it was.
    """
    lock = SaveLock(tmp_path, "this", print, print, beat_seconds=600)
    lock.acquire()
    saver, told = make_saver(trainer, tmp_path, async_save=async_save)
    saver.lock, ended = lock.me.token, []
    saver.save(TrainState(1, 0, 0))
    saver.finish()
    monkeypatch.setattr(saving, "end_taken_over", lambda *whose: ended.append(whose))
    other, theirs = Holder.here("another"), tmp_path / "iter_0000002.saving"

    def suspended(*_):
        shutil.rmtree(theirs, ignore_errors=True)
        theirs.mkdir()
        (theirs / "__0_0.distcp").write_text("theirs")
        lock.path.write_text(json.dumps(asdict(other)))

    if moment == "save":
        suspended()
    else:
        monkeypatch.setattr(writer, moment, suspended)
    with pytest.raises(TakenOver):
        saver.save(TrainState(2, 0, 0))
        saver.finish()
    assert ended and set(ended) == {(tmp_path, other)}
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", theirs.name]
    assert last_iteration(tmp_path) == 1 and [path.read_text() for path in theirs.iterdir()] == ["theirs"]
    lock.release()


def test_a_directory_that_is_removed_between_saves(trainer, tmp_path):
    """The next save makes it again, with the assets of what the run began from."""
    (tmp_path / "began" / "huggingface").mkdir(parents=True)
    (tmp_path / "began" / "huggingface" / "config.json").write_text("{}")
    saver, _ = make_saver(trainer, tmp_path / "run")
    saver.keep = lambda: keep_assets(tmp_path / "began" / "iter_0000004", tmp_path / "run")
    for iteration in (1, 2):
        saver.save(TrainState(iteration, 0, 0))
        assert (tmp_path / "run" / "huggingface" / "config.json").read_text() == "{}"
        assert last_iteration(tmp_path / "run") == iteration
        shutil.rmtree(tmp_path / "run")


def test_assets_that_find_no_room_are_copied_with_the_next_save(trainer, tmp_path, monkeypatch):
    (tmp_path / "began" / "huggingface").mkdir(parents=True)
    (tmp_path / "began" / "huggingface" / "tokenizer.json").write_text("{}")
    saver, told = make_saver(trainer, tmp_path / "run")
    saver.keep = lambda: keep_assets(tmp_path / "began" / "iter_0000004", tmp_path / "run")
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full_disk)
        saver.keep_assets()
    assert "are not kept with --save" in told.getvalue() and "No space left" in told.getvalue()
    saver.save(TrainState(1, 0, 0))
    assert [path.name for path in (tmp_path / "run" / "huggingface").iterdir()] == ["tokenizer.json"]


def test_damaged_assets_end_no_training(trainer, tmp_path):
    saver, told = make_saver(trainer, tmp_path)
    saver.keep = lambda: read_object(tmp_path / "conversion.json")
    (tmp_path / "conversion.json").write_text("[]")
    saver.save(TrainState(1, 0, 0))
    assert f"--save {tmp_path}: {tmp_path}/conversion.json holds a list of 0, not an object" in told.getvalue()
    assert iterations(tmp_path) == [1]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_without_moments(trainer, tmp_path):
    """They are not in the files, loading asks for what drops them, and the weights come back."""
    step(trainer, 0)
    saver, _ = make_saver(trainer, tmp_path, no_save_optim=True)
    saver.save(TrainState(7, 14, 1))
    directory = find_iteration(tmp_path, 7)
    assert not checkpoint.has_optimizer(directory)
    with pytest.raises(ValueError, match="lacks .* tensors of the optimizer.*--no-load-optim"):
        checkpoint.load(directory, trainer.stages, trainer.optimizer)
    before = weights_of(trainer.stages[0])
    step(trainer, 1)
    assert checkpoint.load(directory, trainer.stages, None).iteration == 7
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer.stages[0]).items())


@pytest.mark.parametrize("change, words", [
    ({"num_hidden_layers": 3}, "num_hidden_layers 2 there, 3 here"),
    ({"n_routed_experts": 16}, "n_routed_experts 8 there, 16 here"),
    ({"num_nextn_predict_layers": 2}, "holds no Multi-Token Prediction module, the model has 2"),
])
def test_another_number_of_layers_experts_or_mtp_modules_is_refused(trainer, tmp_path, change, words):
    saver, _ = make_saver(trainer, tmp_path)
    saver.save(TrainState(1, 0, 0))
    assert check_checkpoint(tmp_path, V3_SMALL) == find_iteration(tmp_path, 1)
    with pytest.raises(ValueError, match=words):
        check_checkpoint(tmp_path, replace(V3_SMALL, **change))


def test_damage_is_refused_before_anything_is_built(trainer, tmp_path):
    """With the file and what to do instead; a directory without checksums passes, as older ones do."""
    saver, _ = make_saver(trainer, tmp_path)
    for iteration in (1, 2):
        saver.save(TrainState(iteration, 0, 0))
    file = find_iteration(tmp_path, 2) / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"__0_0.distcp is truncated: .*--ckpt-step 1 loads another one"):
        check_checkpoint(tmp_path, V3_SMALL)
    assert check_checkpoint(tmp_path, V3_SMALL, step=1) == find_iteration(tmp_path, 1)
    shutil.copytree(find_iteration(tmp_path, 1), tmp_path / "iter_0000003")
    (tmp_path / "iter_0000003" / "checksums.json").unlink()
    assert check_checkpoint(tmp_path, V3_SMALL, step=3) and verify(tmp_path / "iter_0000003") is None
