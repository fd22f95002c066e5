"""Native checkpoints small enough to reshard in no time, written by DCP itself."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from small_checkpoints import V3_WIDE

from megatron_deepseek.checkpoint.convert.names import native_places
from megatron_deepseek.checkpoint.integrity import checksum_directory
from megatron_deepseek.cli.reshard_checkpoint import main
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import BIAS

MODEL = replace(V3_WIDE, num_hidden_layers=4, n_routed_experts=8, num_attention_heads=4)


def random_state(config: ModelConfig = MODEL, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights and moments by the names under which they are saved."""
    generator, state = torch.Generator().manual_seed(seed), {}
    shapes = {place.whole: place.whole_shape for place in native_places(config)}
    for prefix in ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq."):
        state |= {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()
                  if prefix == "model." or not name.endswith(BIAS)}
    return state


def write_native(root: Path, state: dict[str, torch.Tensor], config: ModelConfig = MODEL, iteration: int = 100,
                 **more) -> Path:
    """SAVE with one iteration, of one file; `more` is in its state.json."""
    directory = root / f"iter_{iteration:07d}"
    directory.mkdir(parents=True)
    dcp.save(state, checkpoint_id=directory, no_dist=True)
    (directory / "config.json").write_text(json.dumps(config.to_hf_dict()))
    (directory / "state.json").write_text(json.dumps(
        {"iteration": iteration, "consumed_samples": 7 * iteration, "optimizer_steps": iteration,
         "batches": [[iteration, 7]], **more}))
    job = {"name": "job", "slurm_id": "", "slurm_restarts": 0}
    (directory / "arguments.json").write_text(json.dumps({"settings": {}, "origin": None, "job": job, "files": {}}))
    checksum_directory(directory)
    (root / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return root


def read_native(root: Path, state: dict[str, torch.Tensor], iteration: int = 100) -> dict[str, torch.Tensor]:
    """What DCP itself reads for the names of `state`."""
    found = {name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}
    dcp.load(found, checkpoint_id=root / f"iter_{iteration:07d}", no_dist=True)
    return found


def tool(*arguments) -> int:
    """The exit status of reshard_checkpoint.py."""
    return main([str(argument) for argument in arguments], {})
