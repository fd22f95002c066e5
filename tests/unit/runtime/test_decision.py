"""What a run begins from: every combination of --save, what it holds, --load and the arguments beside it."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
from small_datasets import EOD, SEQ, write_dataset

from megatron_deepseek.arguments import parse
from megatron_deepseek.checkpoint.native import ARGUMENTS
from megatron_deepseek.checkpoint.tracker import TRACKER, begins_anew, iteration_directory
from megatron_deepseek.model.architecture.config import RopeScaling
from megatron_deepseek.model.architecture.presets import TINY
from megatron_deepseek.runtime import decision
from megatron_deepseek.runtime.decision import Start, decide, overwrite, share
from megatron_deepseek.runtime.recorded import Job, RecordedArguments
from megatron_deepseek.pretraining.loop import Pretraining
from megatron_deepseek.runtime.resume import check_and_decide, save_lock
from megatron_deepseek.runtime.save_lock import LOCK, Holder, SaveLock, read_holder
from megatron_deepseek.settings import RunSettings

JOB = Job("this")
ANOTHER = Job("another")


@pytest.fixture(autouse=True)
def with_optimizer(monkeypatch):
    """The checkpoints here are names and config.json alone."""
    monkeypatch.setattr(decision, "has_optimizer", lambda directory: True)


def checkpoint(root: Path, iteration: int, origin: str | None = None, job: Job = ANOTHER) -> None:
    directory = iteration_directory(root, iteration)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    (directory / ARGUMENTS).write_text(json.dumps(RecordedArguments({}, origin, job).to_json()))
    (root / TRACKER).write_text(f"{iteration}\n")


def begin(job: Job = JOB, **run) -> Start:
    return decide(RunSettings(100, **run), TINY, job)


def test_nothing_there_begins_anew(tmp_path):
    save = tmp_path / "run"
    for run in ({}, {"save": save}, {"save": save, "load": save}, {"save": save, "overwrite": True}):
        assert begin(**run) == Start(overwrite=False)
    with pytest.raises(ValueError, match="there is no such directory"):
        begin(save=save, load=save, ckpt_step=3)
    (save / "iter_0000003.saving").mkdir(parents=True)
    assert begin(save=save, load=save) == Start()


def test_an_own_checkpoint_is_continued(tmp_path):
    checkpoint(tmp_path, 2, origin="/weights")
    checkpoint(tmp_path, 4, origin="/weights")
    for load in (tmp_path, tmp_path / ".." / tmp_path.name):
        start = begin(save=tmp_path, load=load)
        assert (start.load, start.is_saved, start.origin) == (tmp_path / "iter_0000004", True, "/weights")
        assert not start.finetune and not start.weights_only and start.before.job == ANOTHER
    back = begin(save=tmp_path, load=tmp_path, ckpt_step=2, no_load_optim=True)
    assert (back.load, back.is_saved, back.weights_only) == (tmp_path / "iter_0000002", False, True)
    with pytest.raises(ValueError, match="no finished checkpoint of iteration 3; it has iterations 2, 4"):
        begin(save=tmp_path, load=tmp_path, ckpt_step=3)


def test_the_first_start_from_elsewhere(tmp_path):
    """Native: its iteration, or one that is named; weights alone by an argument. The origin is the directory given."""
    there = tmp_path / "there"
    checkpoint(there, 2)
    checkpoint(there, 4)
    for run, expected in (({}, Start(there / "iter_0000004")),
                          ({"ckpt_step": 2}, Start(there / "iter_0000002")),
                          ({"no_load_optim": True}, Start(there / "iter_0000004", weights_only=True)),
                          ({"finetune": True}, Start(there / "iter_0000004", weights_only=True, finetune=True))):
        start = begin(save=tmp_path / "run", load=there, **run)
        assert replace(start, before=None) == replace(expected, origin=str(there.resolve()))
        assert (start.before is None) == start.finetune
    with pytest.raises(ValueError, match="--load .*: there is no such directory"):
        begin(save=tmp_path / "run", load=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it is one checkpoint of .*/there; give that directory, with --ckpt-step 4"):
        begin(save=tmp_path / "run", load=there / "iter_0000004")


def test_checkpoints_are_not_mixed_with_a_released_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    (tmp_path / "model.safetensors").write_bytes(b"")
    for run in ({}, {"load": tmp_path}, {"load": tmp_path / "elsewhere"}):
        with pytest.raises(ValueError, match=f"--save {tmp_path} is a Hugging Face model, which checkpoints would mix"):
            begin(save=tmp_path, **run)


def test_the_same_command_goes_on(tmp_path):
    """--load of what the run began from, with what was meant for its first start; said in a line."""
    there, save = tmp_path / "there", tmp_path / "run"
    checkpoint(there, 4)
    checkpoint(save, 7, origin=str(there.resolve()))
    for run in ({}, {"finetune": True}, {"ckpt_step": 4}, {"no_load_optim": True}):
        start = begin(save=save, load=there, **run)
        assert (start.load, start.is_saved, start.finetune, start.weights_only) == (
            save / "iter_0000007", True, False, False)
        assert start.origin == str(there.resolve())
        assert start.notes == (f"--save {save} holds a checkpoint of iteration 7, with which this run goes on: "
                               f"--load {there} was for its first start",)
    (save / "iter_0000007" / ARGUMENTS).unlink()  # an older version's: nobody knows what it began from
    assert begin(save=save, load=there).load == save / "iter_0000007"


def test_anothers_run_is_not_overwritten_unasked(tmp_path):
    save, there = tmp_path / "run", tmp_path / "there"
    checkpoint(save, 7, origin=None)
    checkpoint(there, 4)
    ways = f"--load {save} goes on with it, --overwrite removes it and begins anew"
    with pytest.raises(ValueError) as refused:
        begin(save=save)
    assert str(refused.value) == f"--save {save} holds a run of iteration 7: {ways}"
    with pytest.raises(ValueError) as refused:
        begin(save=save, load=there)
    assert str(refused.value) == (f"--save {save} holds a run of iteration 7 that began from nothing, not from --load "
                                  f"{there}: {ways}")
    assert begin(save=save, overwrite=True) == Start(overwrite=True)
    asked = begin(save=save, load=there, overwrite=True)
    assert (asked.load, asked.overwrite, asked.is_saved) == (there / "iter_0000004", True, False)


def test_what_this_job_saved_before_a_restart_goes_before_everything(tmp_path):
    """Under --overwrite a restart would otherwise remove what its earlier life has done."""
    there, save = tmp_path / "there", tmp_path / "run"
    checkpoint(there, 4)
    checkpoint(save, 3)
    checkpoint(save, 7, job=JOB)
    for run in ({"overwrite": True}, {}, {"load": there, "finetune": True, "overwrite": True}, {"load": there},
                {"load": save, "ckpt_step": 3}, {"load": save, "no_load_optim": True}):
        start = begin(save=save, **run)
        assert (start.load, start.overwrite, start.weights_only) == (save / "iter_0000007", False, False), run


def test_lives_of_a_job():
    """Under one torchrun, or requeued by Slurm, which then counts; two runs of one allocation are two jobs."""
    slurm = Job("a", "77", 1)
    assert Job("a").is_earlier_start_of(Job("a")) and not Job("a").is_earlier_start_of(Job("b"))
    assert slurm.is_earlier_start_of(Job("b", "77", 2)) and not slurm.is_earlier_start_of(Job("b", "77", 1))
    assert not slurm.is_earlier_start_of(Job("b", "78", 2))
    assert Job.here("a", {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}) == slurm and Job.here("a", {}) == Job("a")


def test_a_lost_marker_is_not_taken_for_an_empty_directory(tmp_path):
    checkpoint(tmp_path, 7)
    (tmp_path / TRACKER).unlink()
    for run in ({"load": tmp_path}, {}):
        with pytest.raises(ValueError, match="is missing; it has iteration 7: --ckpt-step 7 loads one"):
            begin(save=tmp_path, **run)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    for iteration in (3, 7):
        checkpoint(tmp_path, iteration)
    for name in ("metrics.jsonl", LOCK, "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "huggingface").mkdir()
    assert overwrite(tmp_path) == (f"removed 2 checkpoints of an older run, the last of iteration 7, and its records "
                                   f"from {tmp_path}")
    assert begins_anew(tmp_path) and sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", LOCK]


def test_everybody_must_see_the_lock(meshes, tmp_path):
    """One rank here; test_start.py in tests/parallel has two whose directories differ."""
    start = Start(lock=Holder.here("job").token)
    assert share(start, None) == start
    with pytest.raises(ValueError, match=r"--save .*: rank 0 on \S+ does not see what rank 0 on"):
        share(start, tmp_path, seconds=0.05)
    (tmp_path / LOCK).write_text(json.dumps(asdict(Holder.here("job"))))
    with pytest.raises(ValueError, match="must be one directory of a file system that all nodes share"):
        share(start, tmp_path, seconds=0.05)
    (tmp_path / LOCK).write_text(json.dumps(asdict(replace(Holder.here("job"), token=start.lock))))
    assert share(start, tmp_path, seconds=0.05) == start


def settings_of(tmp_path: Path, more: str):
    write_dataset(tmp_path / "data", num_documents=20)
    return parse(f"--model tiny --data-path {tmp_path}/data --tokenizer-type NullTokenizer --tokenizer-model {EOD} "
                 f"--seq-length {SEQ} --train-iters 5 {more}".split(), 1)


@pytest.fixture
def raising(monkeypatch):
    """Raise a mistake instead of ending the process, after it has given up the lock."""
    def refused(line: str):
        raise ValueError(line)

    monkeypatch.setattr("megatron_deepseek.runtime.user_errors.end_with_error", refused)
    monkeypatch.setattr("megatron_deepseek.runtime.resume.SaveLock", partial(SaveLock, leaving_seconds=0.05))


def test_what_is_there_is_looked_at_under_the_lock(tmp_path, raising, monkeypatch):
    """A run that ended just before is then seen whole; a second run is refused, and leaves the first one's lock."""
    settings = settings_of(tmp_path, f"--save {tmp_path}/run")
    monkeypatch.setattr("megatron_deepseek.runtime.resume.decide", lambda run, model, job, token, lora, form: Start(
        lock=token, notes=((tmp_path / "run" / LOCK).read_text(),)))
    first = save_lock(settings, JOB)
    start = check_and_decide(settings, JOB, first, Pretraining())
    assert start.lock == first.me.token and first.me.token in start.notes[0]
    with pytest.raises(ValueError, match=f"--save {tmp_path}/run is in use by process"):
        check_and_decide(settings, ANOTHER, save_lock(settings, ANOTHER), Pretraining())
    assert read_holder(tmp_path / "run" / LOCK) == first.me
    first.release()


def test_a_refused_start_leaves_nothing(tmp_path, raising):
    """Neither a lock nor a directory; other ranks, and runs without --save, have no lock."""
    settings = settings_of(tmp_path, f"--save {tmp_path}/run --load {tmp_path}/nowhere")
    with pytest.raises(ValueError, match="--load .*nowhere: there is no such directory"):
        check_and_decide(settings, JOB, save_lock(settings, JOB), Pretraining())
    assert not (tmp_path / "run").exists()
    assert save_lock(settings_of(tmp_path, ""), JOB) is None


def test_a_directory_for_tensorboard_that_cannot_be_written(tmp_path, raising):
    (tmp_path / "file").write_text("")
    settings = settings_of(tmp_path, f"--tensorboard-dir {tmp_path}/file/events")
    with pytest.raises(ValueError, match="--tensorboard-dir .*: nothing can be written to .*: Not a directory"):
        check_and_decide(settings, JOB, None, Pretraining())


# What changes the forward without changing a shape, its value in TINY, another, and how the difference is told.
FORWARD_CHANGES = (
    ({"rope_theta": 5e4}, "rope_theta 10000.0 there, 50000.0 here"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-06 there, 1e-05 here"),
    ({"rope_scaling": RopeScaling("linear", 8.0)}, 'rope_scaling null there, {"type": "linear", "factor": 8.0} here'),
)


@pytest.mark.parametrize("change, words", FORWARD_CHANGES)
def test_a_run_goes_on_with_the_forward_that_it_began_with(tmp_path, change, words):
    """Also where moments are left out, since the directory is its own; and where another run's moments are taken."""
    save, there = tmp_path / "run", tmp_path / "there"
    checkpoint(save, 7)
    checkpoint(there, 4)
    model = replace(TINY, **change)
    for run in ({"save": save, "load": save}, {"save": save, "load": save, "no_load_optim": True},
                {"save": tmp_path / "new", "load": there}):
        with pytest.raises(ValueError) as refused:
            decide(RunSettings(100, **run), model, JOB)
        directory = there / "iter_0000004" if run["load"] == there else save / "iter_0000007"
        assert str(refused.value) == (
            f"--load {directory}: a run goes on as it began, but {words}; --finetune or --no-load-optim with another "
            "--save takes over the weights alone")


@pytest.mark.parametrize("change, words", FORWARD_CHANGES)
def test_weights_alone_are_taken_into_another_forward_with_a_line(tmp_path, monkeypatch, change, words):
    """As where the context is extended. The run that follows goes on with its own checkpoints without a word."""
    there, save, model = tmp_path / "there", tmp_path / "run", replace(TINY, **change)
    checkpoint(there, 4)
    for run in ({"finetune": True}, {"no_load_optim": True}):
        start = decide(RunSettings(100, save=save, load=there, **run), model, JOB)
        assert start.load == there / "iter_0000004" and start.weights_only
        assert start.notes == (f"the weights of {start.load} are taken over into another forward: {words}",)
    checkpoint(save, 5, origin=str(there.resolve()))
    (save / "iter_0000005" / "config.json").write_text(json.dumps(model.to_hf_dict()))
    (again,) = decide(RunSettings(100, save=save, load=there, finetune=True), model, JOB).notes
    assert again.startswith(f"--save {save} holds a checkpoint")
    released = tmp_path / "converted"
    checkpoint(released, 0)
    monkeypatch.setattr(decision, "has_optimizer", lambda directory: False)
    (line,) = decide(RunSettings(100, load=released), model, JOB).notes
    assert line.endswith(words)


def test_other_routing_is_another_architecture_whatever_is_taken_over(tmp_path):
    checkpoint(tmp_path, 4)
    with pytest.raises(ValueError, match="of another architecture: routed_scaling_factor 2.5 there, 2.0 here"):
        decide(RunSettings(100, load=tmp_path, finetune=True), replace(TINY, routed_scaling_factor=2.0), JOB)
