"""megatron-core's own GPTModel as each rank of a divided job has it, and its state in the legacy format, on one CPU.

    python megatron_ranks.py CONFIG.json WHOLE LEGACY TP PP VIRTUAL EP ETP

A model with random weights is saved whole to WHOLE (torch_dist), then rank by rank to LEGACY, as Megatron-LM's
checkpointing does it with `--ckpt-format torch`. Ranks are faked: none communicates. Which part of the whole a rank's
tensor is, says the module itself (`sharded_state_dict`).
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

import megatron_model  # it replaces what needs CUDA
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, enums, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore

GPTModel.setup_embeddings_and_output_layer = lambda _: None  # it sums copies of the embedding, on CUDA


def whole_state(fields: dict, directory: str) -> dict[str, torch.Tensor]:
    """Save a model of one rank, and return its tensors by the names under which they are saved."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    parallel_state.initialize_model_parallel()
    model = megatron_model.build(fields)
    megatron_model.randomize(model)
    os.makedirs(directory)
    dist_checkpointing.save(model.sharded_state_dict(), directory)
    state: dict[str, torch.Tensor] = {}
    fill(model, state, give=False)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return state


@torch.no_grad()
def fill(model, whole: dict[str, torch.Tensor], give: bool) -> None:
    """Copy the model's tensors into their place in the whole ones, or if `give` the other way."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": group})
    apply_factories(sharded)
    for part in nested_values(sharded):
        if not isinstance(part, ShardedTensor) or part.data is None:
            continue
        if part.key not in whole:
            whole[part.key] = torch.zeros(part.global_shape, dtype=part.dtype)
        place = tuple(slice(begin, begin + size) for begin, size in zip(part.global_offset, (
            *(1 for _ in range(part.prepend_axis_num)), *part.local_shape)))
        (part.data.copy_(whole[part.key][place].view(part.data.shape)) if give
         else whole[part.key][place].copy_(part.data.view(whole[part.key][place].shape)))


def save_rank(fields: dict, whole: dict[str, torch.Tensor], root: Path, rank: int, sizes: dict[str, int]) -> None:
    """Save what the rank has, if it is one of those that save."""
    tp, pp, virtual, ep, etp = sizes.values()
    world = pp * tp * max(1, ep * etp // tp)
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    parallel_state.initialize_model_parallel(tp, pp, virtual if virtual > 1 else None, expert_model_parallel_size=ep,
                                             expert_tensor_parallel_size=etp, create_gloo_process_groups=False)
    if parallel_state.get_data_parallel_rank() == 0 or parallel_state.get_expert_data_parallel_rank() == 0:
        save_file(fields, whole, root, sizes)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def save_file(fields: dict, whole: dict[str, torch.Tensor], root: Path, sizes: dict[str, int]) -> None:
    _, pp, virtual, ep, _ = sizes.values()
    chunks = []
    for number in range(virtual):
        model = megatron_model.build(fields, sizes, number)
        fill(model, whole, give=True)
        chunks.append(model.state_dict_for_save_checkpoint())
    models = {"model": chunks[0]} if virtual == 1 else {f"model{number}": each for number, each in enumerate(chunks)}
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}" * (pp > 1)
    name += f"_{parallel_state.get_expert_model_parallel_rank():03d}" * (ep > 1)
    (root / "iter_0000007" / name).mkdir(parents=True, exist_ok=True)
    torch.save({"args": argparse.Namespace(**sizes, model_type=enums.ModelType.encoder_or_decoder), **models,
                "iteration": 7, "checkpoint_version": 3.0, "rng_state": [random.getstate()]},
               root / "iter_0000007" / name / "model_optim_rng.pt")


def main() -> None:
    config, whole_directory, legacy, *numbers = sys.argv[1:]
    fields, names = json.loads(Path(config).read_text()), megatron_model.SIZES
    sizes = dict(zip(names, map(int, numbers)))
    tp, pp, _, ep, etp = sizes.values()
    whole = whole_state(fields, whole_directory)
    for rank in range(pp * tp * max(1, ep * etp // tp)):
        save_rank(fields, whole, Path(legacy), rank, sizes)
    (Path(legacy) / "latest_checkpointed_iteration.txt").write_text("7")


if __name__ == "__main__":
    main()
