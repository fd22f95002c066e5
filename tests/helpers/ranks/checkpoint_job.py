"""What a rank does in tests of checkpoints: train, save, load in another layout, and hand back every number."""

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from cases import Case
from job import LEARNING_RATE, batch, make_batch, named, own_rows, spec_of, whole

from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.verification import verify
from megatron_deepseek.checkpoint.job.distributed import BackgroundSaver, first_failure
from megatron_deepseek.checkpoint.job.export import export_hf
from megatron_deepseek.checkpoint.job.state import MOMENTS
from megatron_deepseek.checkpoint.loadable import checkpoint_directory
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.checkpoint.workspace import Workspace
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.settings import RunSettings
from megatron_deepseek.training.trainer import Trainer

STEPS = 2


def build(case: Case) -> Trainer:
    return Trainer(spec_of(case), build_meshes(case.layout, torch.device("cpu")))


def step(trainer: Trainer, case: Case, number: int):
    whole_batch = make_batch(*batch(case.model, case.global_batch_size, number))
    return trainer.train_step(own_rows(whole_batch, trainer.meshes), learning_rate=LEARNING_RATE, bias_rate=1e-2)


def held(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every weight, bias and moment of this rank's stages by the name in a checkpoint."""
    found = {f"model.{name}": tensor for how in ("named_parameters", "named_buffers")
             for (_, name), tensor in named(trainer, how)}
    return found | {f"optimizer.{moment}.{name}": trainer.optimizer.state[parameter][moment]
                    for (_, name), parameter in named(trainer, "named_parameters") if parameter.requires_grad
                    for moment in MOMENTS}


def numbers(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The same, gathered from all ranks."""
    return {name: whole(tensor) for name, tensor in held(trainer).items()}


def train_and_save(case: Case, root: Path) -> dict[str, torch.Tensor]:
    """From nothing; the numbers after STEPS steps."""
    trainer = build(case)
    for number in range(STEPS):
        step(trainer, case, number)
    done = TrainState(STEPS, STEPS * case.global_batch_size, STEPS, ((STEPS, case.global_batch_size),))
    checkpoint.save(root, done, case.model, trainer.stages, trainer.optimizer)
    return numbers(trainer)


def load_and_save(case: Case, load: Path, save: Path) -> dict[str, torch.Tensor]:
    """What arrives in the layout of `case`, saved again from there."""
    trainer = build(case)
    state = checkpoint.load(checkpoint_directory(load), trainer.stages, trainer.optimizer)
    assert state.to_json() == {"iteration": STEPS, "consumed_samples": STEPS * case.global_batch_size,
                               "optimizer_steps": STEPS, "batches": ((STEPS, case.global_batch_size),)}
    checkpoint.save(save, state, case.model, trainer.stages, trainer.optimizer)
    return numbers(trainer)


def go_on(case: Case, load: Path | None, save: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """STEPS steps from nothing, or from a checkpoint of any layout and any trained subset: the numbers, and how many
    updates each parameter of this rank has behind it.
    """
    trainer, state = build(case), TrainState()
    if load is not None:
        state = checkpoint.load(checkpoint_directory(load), trainer.stages, trainer.optimizer)
    for number in range(state.iteration, state.iteration + STEPS):
        step(trainer, case, number)
        state = state.after(case.global_batch_size, True)
    checkpoint.save(save, state, case.model, trainer.stages, trainer.optimizer)
    return numbers(trainer), {item.name: float(trainer.optimizer.state[item.parameter]["step"])
                              for item in trainer.parameters}


def uninterrupted_and_resumed(case: Case, root: Path) -> tuple[dict, dict]:
    """The numbers after 2 * STEPS steps, in one go and with a checkpoint loaded by fresh ranks' objects half-way."""
    trainer = build(case)
    for number in range(STEPS):
        step(trainer, case, number)
    checkpoint.save(root, TrainState(STEPS, 0, STEPS), case.model, trainer.stages, trainer.optimizer)
    resumed = build(case)
    checkpoint.load(checkpoint_directory(root), resumed.stages, resumed.optimizer)
    for number in range(STEPS, 2 * STEPS):
        ours, theirs = step(trainer, case, number), step(resumed, case, number)
        assert (ours.losses, ours.grad_norm) == (theirs.losses, theirs.grad_norm)
    return numbers(trainer), numbers(resumed)


def save_in_the_background(case: Case, root: Path) -> tuple[dict, dict]:
    """The numbers when a background save began, and those that it wrote although training went on."""
    trainer = build(case)
    step(trainer, case, 0)
    saver = BackgroundSaver(dist.new_group(backend="gloo"))
    for iteration in (1, 2):
        before = numbers(trainer)
        future = saver.begin(root, TrainState(iteration, 0, iteration), case.model, trainer.stages, trainer.optimizer)
        step(trainer, case, iteration)
        assert future.result() is not None
    saver.close()
    written = build(case)
    checkpoint.load(checkpoint_directory(root), written.stages, written.optimizer)
    return before, numbers(written)


def save_on_a_full_disk(case: Case, root: Path, in_background: bool) -> tuple[OSError, float]:
    """The last rank's disk is full after its first tensors: the error that this rank sees, and after how long."""
    trainer = build(case)
    checkpoint.save(root, TrainState(1, 0, 1), case.model, trainer.stages, trainer.optimizer)
    if dist.get_rank() == dist.get_world_size() - 1:
        _fill_disk_after(20_000)
    begun, state = time.monotonic(), TrainState(2, 0, 2)
    try:
        if in_background:
            saver = BackgroundSaver(dist.new_group(backend="gloo"))
            error = saver.begin(root, state, case.model, trainer.stages, trainer.optimizer).exception()
            raise first_failure(error)
        checkpoint.save(root, state, case.model, trainer.stages, trainer.optimizer)
    except OSError as error:
        return error, time.monotonic() - begun
    raise AssertionError("the save went through")


def save_without_a_shared_directory(case: Case, root: Path) -> tuple[str, list[str]]:
    """The last rank is on another node, whose --save is its own disk, where that directory exists too: the error of a
    second save as this rank sees it, and what lies in this rank's directory then.
    """
    from megatron_deepseek.checkpoint.dcp import storage_writer as writer

    trainer, await_files = build(case), writer.await_files
    checkpoint.save(root / "0", TrainState(1, 0, 1), case.model, trainer.stages, trainer.optimizer, keep_last=1)
    own = root / str(dist.get_rank() // (dist.get_world_size() - 1))
    (own / "iter_0000002.saving").mkdir(parents=True, exist_ok=True)
    writer.await_files = lambda directory, ranks: await_files(directory, ranks, seconds=0.5)
    try:
        checkpoint.save(own, TrainState(2, 0, 2), case.model, trainer.stages, trainer.optimizer, keep_last=1)
    except OSError as error:
        return f"{error.filename}: {error.strerror}", sorted(path.name for path in own.iterdir())
    finally:
        writer.await_files = await_files
    raise AssertionError("the save went through")


def space_asked_for(case: Case, root: Path) -> tuple[list[int], int]:
    """What a save asks for on the rank that looks, and how many bytes its ranks then wrote."""
    from megatron_deepseek.checkpoint.dcp import storage_writer as writer

    asked, bytes_of = [], writer.bytes_of
    writer.bytes_of = lambda plans: asked.append(bytes_of(plans)) or asked[-1]
    try:
        trainer = build(case)
        step(trainer, case, 0)
        directory = checkpoint.save(root, TrainState(1, 0, 1), case.model, trainer.stages, trainer.optimizer)
    finally:
        writer.bytes_of = bytes_of
    return asked, sum(path.stat().st_size for path in directory.glob("*.distcp"))


def _fill_disk_after(nbytes: int) -> None:
    """In this process: what is written to a file of weights beyond `nbytes` meets ENOSPC, after a part of it."""
    from megatron_deepseek.checkpoint.dcp import storage_writer as writer

    class Full:
        def __init__(self, raw):
            self.raw, self.name, self.left = raw, raw.name, nbytes

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = self.raw.write(data[:self.left])
            self.left -= written
            return written

        def fileno(self):
            return self.raw.fileno()

    checksummed = writer.ChecksummedFile
    writer.ChecksummedFile = lambda raw: checksummed(Full(raw))


def load_damaged(case: Case, root: Path) -> list[str]:
    return [str(each) for each in verify(checkpoint_directory(root))]


def load_into(case: Case, root: Path, with_optimizer: bool) -> str:
    """The error of loading another model's checkpoint, as this rank sees it."""
    trainer = build(case)
    try:
        checkpoint.load(checkpoint_directory(root), trainer.stages, trainer.optimizer if with_optimizer else None)
    except ValueError as error:
        return str(error)
    raise AssertionError("it was loaded")


def export_after_a_kill(case: Case, root: Path) -> tuple[bool, list[str]]:
    """Two starts of a run that exports: the first is killed before the export gets its name, and in the second the
    last rank comes late. Whether this rank still waits for the others after a while, and what is there then.
    """
    trainer, run = build(case), RunSettings(1, save=root / "run", save_hf=root / "export")
    checkpoint.save(run.save, TrainState(1, 0, 1), case.model, trainer.stages, trainer.optimizer)
    rank, last, published, publish = dist.get_rank(), dist.get_world_size() - 1, Workspace.published, Workspace.publish
    Workspace.publish = lambda *_: {}["killed"]
    with contextlib.suppress(KeyError):
        export_hf(run, rank, dist.get_world_size())
    dist.barrier()
    Workspace.publish = publish
    Workspace.published = lambda *of: (time.sleep(1.0 if rank == last else 0.0), published(*of))[1]
    second = threading.Thread(target=export_hf, args=(run, rank, dist.get_world_size()), daemon=True)
    second.start()
    second.join(20)
    dist.barrier()
    return second.is_alive(), sorted(path.name for path in root.iterdir())
