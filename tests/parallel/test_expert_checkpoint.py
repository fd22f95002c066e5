"""Slices of experts in checkpoints: what one layout saves under the whole parameter's name and shape, any other loads.

A rank of an expert-tensor-parallel layout holds two regions of gate_up_proj, rows of gate and rows of up: a wrong
offset would not be seen by training alone.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import NUM_EXPERTS, Case
from job import batch, make_batch, named, own_rows, spec_of, whole

from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.state import MOMENTS
from megatron_deepseek.checkpoint.tracker import iteration_directory
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.training.trainer import Trainer

pytestmark = pytest.mark.slow

SLICED = Case(dp=2, tp=2, ep=2, etp=2, mtp=1)
LAYOUTS = (Case(mtp=1), SLICED, Case(dp=4, etp=4, mtp=1), Case(dp=3, mtp=1),
           Case(pp=2, schedule="1F1B", microbatches=2, dp=4, etp=2, mtp=1))
NAME = "model.model.layers.1.mlp.experts.gate_up_proj"


def contents(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Whole weights and moments of this rank's stages."""
    weights = {name: whole(tensor) for (_, name), tensor in named(trainer, "named_parameters")}
    moments = {f"{moment}.{name}": whole(trainer.optimizer.state[parameter][moment])
               for (_, name), parameter in named(trainer, "named_parameters") for moment in MOMENTS}
    return weights | moments


def save_after_a_step(case: Case, root: Path, in_background: bool) -> dict[str, torch.Tensor]:
    meshes = build_meshes(case.layout, torch.device("cpu"))
    trainer = Trainer(spec_of(case), meshes)
    trainer.train_step(own_rows(make_batch(*batch(case.model, case.layout.dp, 0)), meshes), learning_rate=1e-2)
    state, stages = checkpoint.TrainState(1, 1, 1), trainer.stages
    if in_background:
        saver = checkpoint.BackgroundSaver(dist.new_group(backend="gloo"))
        saver.begin(root, state, case.model, stages, trainer.optimizer).result()
        saver.close()
    else:
        checkpoint.save(root, state, case.model, stages, trainer.optimizer)
    return contents(trainer)


def load(case: Case, root: Path) -> dict[str, torch.Tensor]:
    trainer = Trainer(spec_of(case), build_meshes(case.layout, torch.device("cpu")))
    checkpoint.load(iteration_directory(root, 1), trainer.stages, trainer.optimizer)
    return contents(trainer)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    root = tmp_path_factory.mktemp("sliced")
    expected, *_ = ranks.run(SLICED.layout.world_size, save_after_a_step, SLICED, root, False)
    return root, expected


def test_files_know_whole_experts_only(saved):
    root, expected = saved
    entry = dcp.FileSystemReader(iteration_directory(root, 1)).read_metadata().state_dict_metadata[NAME]
    width = SLICED.model.moe_intermediate_size
    assert tuple(entry.size) == (NUM_EXPERTS, 2 * width, 16)
    state = {NAME: torch.zeros(entry.size, dtype=torch.float64)}
    dcp.load(state, checkpoint_id=iteration_directory(root, 1), no_dist=True)
    assert torch.equal(state[NAME], expected[NAME.removeprefix("model.")])


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_any_layout_loads_slices(ranks, saved, case):
    root, expected = saved
    for loaded in ranks.run(case.layout.world_size, load, case, root):
        assert loaded.keys() <= expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_slices_are_saved_in_the_background_too(ranks, saved, tmp_path):
    _, expected = saved
    ranks.run(SLICED.layout.world_size, save_after_a_step, SLICED, tmp_path, True)
    (loaded,) = ranks.run(1, load, LAYOUTS[0], tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
