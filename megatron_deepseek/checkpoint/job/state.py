"""The tensors that a rank saves and loads, by their names in a checkpoint: weights, router biases and moments.

Of stages with adapters (model/lora.py) the adapters are saved, and the frozen base is not.
"""

from collections.abc import Callable

import torch
from torch import nn

from megatron_deepseek.checkpoint.native import OPTIMIZER, WEIGHTS
from megatron_deepseek.model.architecture.adapters import is_adapter
from megatron_deepseek.model.architecture.base_weights import SCALES
from megatron_deepseek.model.frozen import trained_parameters
from megatron_deepseek.parallel.shards import for_checkpoint

MOMENTS = ("exp_avg", "exp_avg_sq")


def moment_name(moment: str, parameter: str) -> str:
    """Return the name of a parameter's moment in a checkpoint."""
    return f"{OPTIMIZER}{moment}.{parameter}"


def model_state(stages: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Return weights and router biases of this rank by name; of stages with adapters these and router biases.

    If several stages of the rank have a copy of a parameter, the first one is taken.
    """
    return _state(stages, lambda stage, name: stage.lora is None or is_adapter(name), buffers=True)


def base_state(stages: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Return the weights that adapters are beside, and router biases, of this rank by name; not those that are kept as
    bytes (base_weights.py).
    """
    held = {name for stage in stages for each in stage.held for name in (each.row.name, each.row.name + SCALES)}
    return _state(stages, lambda stage, name: not (is_adapter(name) or name in held), buffers=True)


def adapter_state(stages: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Return the adapters of this rank by name."""
    return _state(stages, lambda stage, name: is_adapter(name), buffers=False)


def _state(stages: list[nn.Module], takes: Callable[[nn.Module, str], bool], buffers: bool) -> dict[str, torch.Tensor]:
    state = {}
    for stage in stages:
        chosen = [(name, parameter) for name, parameter in stage.named_parameters() if takes(stage, name)]
        for name, tensor in [*chosen, *(stage.named_buffers() if buffers else ())]:
            state.setdefault(WEIGHTS + name, for_checkpoint(tensor.detach()))
    return state


def optimizer_state(stages: list[nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the moments of this rank's trained parameters by name, in the dtype that the optimizer keeps them in."""
    state, updated = {}, {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for stage in stages:
        for name, parameter in trained_parameters(stage):
            assert parameter in updated, f"{name} is not the shard that the optimizer updates"
            for moment in MOMENTS:
                state.setdefault(moment_name(moment, name), for_checkpoint(optimizer.state[parameter][moment]))
    return state


def state_to_save(stages: list[nn.Module], optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """Return weights and router biases of this rank, and the moments of `optimizer` unless it is None."""
    return model_state(stages) | (optimizer_state(stages, optimizer) if optimizer is not None else {})


@torch.no_grad()
def fill_copies(stages: list[nn.Module], optimizer: torch.optim.Optimizer | None) -> None:
    """Copy a parameter and its moments to its further copies on this rank, which `model_state` left out."""
    first: dict[str, nn.Parameter] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            original = first.setdefault(name, parameter)
            if original is parameter:
                continue
            parameter.to_local().copy_(original.to_local())
            for moment in MOMENTS if optimizer is not None and parameter.requires_grad else ():
                optimizer.state[parameter][moment].to_local().copy_(optimizer.state[original][moment].to_local())
