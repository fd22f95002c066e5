"""After tools/reshard_checkpoint.py each rank of a job opens its own files alone, and needs all that is in them."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import Case
from checkpoint_job import held, numbers
from job import BIAS_RATE, LEARNING_RATE, batch, make_batch, own_rows, spec_of

from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.cli.reshard_checkpoint import main
from megatron_deepseek.model.build import Precision
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.training.trainer import Trainer

pytestmark = pytest.mark.slow

SINGLE = Precision(torch.float32)
HEADER_BYTES = 4096  # of torch.save around an item, and again where the reader looks for them
MODEL = dict(pp=2, schedule="1F1B", mtp=1, shared=2, microbatches=4)
WRITER = Case(**MODEL, dp=2, ep=2)
READERS = (  # the model is WRITER's: two layers over two stages
    Case(**MODEL, tp=2, dp=2, ep=4, sp=True), Case(**MODEL | {"pp": 1, "schedule": "none"}, tp=2, dp=3, ep=2),
    Case(**MODEL, cp=2, tp=2, placement="last"), Case(**MODEL, tp=2, dp=2, ep=2, etp=2))
OPTIONS = {"pp": "--pipeline-model-parallel-size", "tp": "--tensor-model-parallel-size",
           "cp": "--context-parallel-size", "ep": "--expert-model-parallel-size",
           "etp": "--expert-tensor-parallel-size", "dp": "--data-parallel-size",
           "layout_string": "--pipeline-model-parallel-layout"}


@dataclass
class Loaded:
    """What a rank held after a load, whole and of its own; files that it opened, and how many bytes it read of them."""

    tensors: dict[str, torch.Tensor]
    local_bytes: int
    files: set[str]
    bytes_read: int


def save_trained(case: Case, root: Path) -> dict[str, torch.Tensor]:
    """One step, so that moments are not zero; then a checkpoint. What this rank saved, whole."""
    trainer = Trainer(spec_of(case, SINGLE), build_meshes(case.layout, torch.device("cpu")))
    whole_batch = make_batch(*batch(case.model, case.global_batch_size, 0))
    trainer.train_step(own_rows(whole_batch, trainer.meshes), LEARNING_RATE, BIAS_RATE)
    checkpoint.save(root, TrainState(1, case.global_batch_size, 1), case.model, trainer.stages, trainer.optimizer)
    return numbers(trainer)


def load_counted(case: Case, root: Path) -> Loaded:
    trainer = Trainer(spec_of(case, SINGLE), build_meshes(case.layout, torch.device("cpu")))
    files, counts, preadv = set(), [], os.preadv

    def counted(descriptor, buffers, offset):
        files.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        counts.append(preadv(descriptor, buffers, offset))
        return counts[-1]

    os.preadv = counted
    checkpoint.load(root / "iter_0000001", trainer.stages, trainer.optimizer)
    os.preadv = preadv
    local = sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in held(trainer).values())
    return Loaded(numbers(trainer), local, files, sum(counts))


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    root = tmp_path_factory.mktemp("saved")
    tensors = {}
    for of_rank in ranks.run(WRITER.layout.world_size, save_trained, WRITER, root):
        tensors |= of_rank
    return root, tensors


@pytest.mark.parametrize("case", READERS, ids=str)
def test_each_rank_opens_only_its_own_files(ranks, saved, tmp_path, case):
    root, tensors = saved
    layout = [text for name, option in OPTIONS.items() if (value := getattr(case, name)) is not None
              for text in (option, str(value))]
    assert main(["reshard", "--load", str(root), "--save", str(tmp_path / "b"), "--seq-length", "8", *layout], {}) == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "b" / "iter_0000001").glob("*.distcp")}
    found = ranks.run(case.layout.world_size, load_counted, case, tmp_path / "b")
    for rank, loaded in enumerate(found):
        assert {name for name in loaded.files if name.startswith("rank")} == {f"rank-{rank:05d}.distcp"}
        assert loaded.files <= set(sizes), "a file that is no data of the checkpoint"
        items = 3 * len(loaded.tensors)
        assert loaded.local_bytes <= loaded.bytes_read <= loaded.local_bytes + items * HEADER_BYTES
        assert sum(sizes[name] for name in loaded.files) <= loaded.local_bytes + items * HEADER_BYTES
        for name, tensor in loaded.tensors.items():
            assert torch.equal(tensor, tensors[name]), (rank, name)
    assert set().union(*(loaded.files for loaded in found)) == set(sizes)
