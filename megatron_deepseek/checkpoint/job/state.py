"""What of a run is saved and loaded: weights, biases and moments of this rank by name."""

import torch
from torch import nn

from megatron_deepseek.model.frozen import trained_parameters
from megatron_deepseek.parallel.shards import for_checkpoint

MOMENTS = ("exp_avg", "exp_avg_sq")


def model_state(stages: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Weights and router biases of this rank by name; of a parameter with copies on several stages the first."""
    state = {}
    for stage in stages:
        for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
            state.setdefault(f"model.{name}", for_checkpoint(tensor.detach()))
    return state


def optimizer_state(stages: list[nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Moments of this rank by parameter name, each in the dtype that the optimizer keeps it in. None of frozen ones."""
    state, updated = {}, {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for stage in stages:
        for name, parameter in trained_parameters(stage):
            assert parameter in updated, f"{name} is not the shard that the optimizer updates"
            for moment in MOMENTS:
                state.setdefault(f"optimizer.{moment}.{name}", for_checkpoint(optimizer.state[parameter][moment]))
    return state


def state_to_save(stages: list[nn.Module], optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """Weights and biases of this rank, and the optimizer's moments unless None."""
    return model_state(stages) | (optimizer_state(stages, optimizer) if optimizer is not None else {})


@torch.no_grad()
def fill_copies(stages: list[nn.Module], optimizer: torch.optim.Optimizer | None) -> None:
    """Further copies of a parameter on this rank, which `model_state` left out, become equal to the first."""
    first: dict[str, nn.Parameter] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            original = first.setdefault(name, parameter)
            if original is parameter:
                continue
            parameter.to_local().copy_(original.to_local())
            for moment in MOMENTS if optimizer is not None and parameter.requires_grad else ():
                optimizer.state[parameter][moment].to_local().copy_(optimizer.state[original][moment].to_local())
