"""Checkpoints that any layout can read: a torch.distributed.checkpoint (DCP) directory for each saved iteration.

    SAVE/iter_0000100/            DCP files: model.NAME, optimizer.exp_avg.NAME, optimizer.exp_avg_sq.NAME
                     /config.json   the architecture, in Hugging Face's form
                     /state.json    iteration, consumed samples, optimizer steps
    SAVE/latest_checkpointed_iteration.txt    written last: a directory that it does not name may be torn

Tensors are saved by global shape and offset, under Hugging Face's parameter names, so nothing in the files depends on
the layout that wrote them.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from megatron_deepseek.checkpoint.hf_reader import HuggingFaceReader
from megatron_deepseek.checkpoint.huggingface import open_huggingface
from megatron_deepseek.checkpoint.marker import MARKER, is_huggingface, iteration_directory, last_iteration
from megatron_deepseek.config import ModelConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainState:
    """Where a run is. `iteration` updates are done; the optimizer may have fewer behind it (weights loaded alone)."""

    iteration: int = 0
    consumed_samples: int = 0
    optimizer_steps: int = 0


def model_state(stages: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Weights and router biases of this rank by name; of a parameter with copies on several stages the first."""
    state = {}
    for stage in stages:
        for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
            state.setdefault(f"model.{name}", tensor.detach())
    return state


def optimizer_state(stages: list[nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Moments of this rank by parameter name, each in the dtype that the optimizer keeps it in."""
    state, updated = {}, {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter in updated, f"{name} is not the shard that the optimizer updates"
            for moment in MOMENTS:
                state.setdefault(f"optimizer.{moment}.{name}", optimizer.state[parameter][moment])
    return state


def save(root: Path, state: TrainState, config: ModelConfig, stages: list[nn.Module],
         optimizer: torch.optim.Optimizer) -> Path:
    """Write a checkpoint of `state.iteration` and make it the latest. Every rank calls it."""
    directory = iteration_directory(root, state.iteration)
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(config.to_hf_dict(), indent=2))
        (directory / "state.json").write_text(json.dumps(asdict(state), indent=2))
    dist.barrier()
    dcp.save(model_state(stages) | optimizer_state(stages, optimizer), checkpoint_id=directory)
    if dist.get_rank() == 0:
        aside = root / f"{MARKER}.tmp"
        aside.write_text(f"{state.iteration}\n")
        os.replace(aside, root / MARKER)
    dist.barrier()
    return directory


def check_checkpoint(root: Path, config: ModelConfig) -> Path:
    """The latest checkpoint's directory, or `root` itself if that is a Hugging Face model.

    ValueError if there is none, or if it is of another architecture.
    """
    iteration = last_iteration(root)
    if iteration is None and is_huggingface(root):
        return _same_architecture(root, open_huggingface(root).config, config, "it")
    if iteration is None:
        raise ValueError(f"--load {root}: it has no finished checkpoint ({MARKER} is missing or names none)")
    directory = iteration_directory(root, iteration)
    _same_architecture(root, ModelConfig.from_file(directory / "config.json"), config, f"iteration {iteration}")
    return directory


def _same_architecture(root: Path, found: ModelConfig, config: ModelConfig, which: str) -> Path:
    """`root`, unless what it holds differs in names, shapes or meaning of weights."""
    theirs, ours = asdict(found), asdict(config)
    different = [f"{name} {theirs[name]} there, {ours[name]} here"
                 for name in _SHAPING if theirs[name] != ours[name]]
    if different:
        raise ValueError(f"--load {root}: {which} is of another architecture: {'; '.join(different)}")
    return root


# What decides the names, shapes or meaning of weights; other fields (dropout, loss weights) may change between runs.
_SHAPING = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank",
            "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
            "first_k_dense_replace", "moe_layer_freq", "n_group", "topk_group", "topk_method", "scoring_func",
            "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers", "tie_word_embeddings",
            "attention_bias")


def has_optimizer(directory: Path) -> bool:
    """Whether a checkpoint has the optimizer's state. Released weights, and what is converted from them, have none."""
    if is_huggingface(directory):
        return False
    saved = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    return any(name.startswith("optimizer.") for name in saved)


def converted_moments(directory: Path, optimizer: torch.optim.Optimizer) -> list[str]:
    """In words, the moments that a checkpoint has in another dtype than `optimizer` keeps them in.

    Loading widens exactly and narrows by rounding to nearest, ties to even.
    """
    saved = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    own = next(iter(optimizer.state.values()))
    dtypes = {moment: {entry.properties.dtype for name, entry in saved.items()
                       if name.startswith(f"optimizer.{moment}.")} for moment in MOMENTS}
    return [f"{moment} was saved in {_names(dtypes[moment])} and is kept in {_names({own[moment].dtype})} from here on"
            for moment in MOMENTS if dtypes[moment] - {own[moment].dtype}]


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def load(directory: Path, stages: list[nn.Module], optimizer: torch.optim.Optimizer | None) -> TrainState:
    """Fill the stages, and the optimizer unless None, from any layout's checkpoint. Every rank calls it.

    Tensors saved in another dtype are converted (`converted_moments` says which).

    Raises ValueError if a tensor is missing, unknown or of another shape: nothing is loaded or dropped in silence.
    """
    state = model_state(stages)
    if optimizer is not None:
        state |= optimizer_state(stages, optimizer)
    released = is_huggingface(directory)
    reader = HuggingFaceReader(open_huggingface(directory)) if released else dcp.FileSystemReader(directory)
    _check_tensors(directory, reader, state, ignore_optimizer=optimizer is None)
    dcp.load(state, storage_reader=reader)
    _fill_copies(stages, optimizer)
    train_state = TrainState() if released else TrainState(**json.loads((directory / "state.json").read_text()))
    if optimizer is not None:
        for stage in stages:
            for parameter in stage.parameters():
                optimizer.state[parameter]["step"] = torch.tensor(
                    float(train_state.optimizer_steps), device=parameter.device)
    return train_state


def load_weights(directory: Path, stages: list[nn.Module]) -> None:
    """Fill what the stages have, and leave the rest of the checkpoint be: inference needs no MTP module."""
    dcp.load(model_state(stages), checkpoint_id=directory)
    _fill_copies(stages, None)


def _check_tensors(directory: Path, reader: dcp.StorageReader, state: dict[str, torch.Tensor],
                   ignore_optimizer: bool) -> None:
    saved = reader.read_metadata().state_dict_metadata
    missing = sorted(set(state) - set(saved))
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} tensors of this model, first {missing[0]}")
    for name, tensor in state.items():
        if tuple(saved[name].size) != tuple(tensor.shape):
            raise ValueError(f"{directory}: {name} has shape {tuple(saved[name].size)}, "
                             f"this model's has {tuple(tensor.shape)}")
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(state))
    unknown = sorted(set(saved) - {name for names in everyone for name in names})
    if ignore_optimizer:
        unknown = [name for name in unknown if not name.startswith("optimizer.")]
    if unknown:
        raise ValueError(f"{directory} has {len(unknown)} tensors that this model lacks, first {unknown[0]}")


@torch.no_grad()
def _fill_copies(stages: list[nn.Module], optimizer: torch.optim.Optimizer | None) -> None:
    """Further copies of a parameter on this rank, which `model_state` left out, become equal to the first."""
    first: dict[str, nn.Parameter] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            original = first.setdefault(name, parameter)
            if original is parameter:
                continue
            parameter.to_local().copy_(original.to_local())
            for moment in MOMENTS if optimizer is not None else ():
                optimizer.state[parameter][moment].to_local().copy_(optimizer.state[original][moment].to_local())
