"""Data parallelism by FSDP2: shards of weights, gradients and optimizer state; every gradient is a SUM.

The losses are already divided by global counts, so nothing here divides by the number of ranks. Dense parameters are
reduced over dp x cp, routed experts over edp.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from megatron_deepseek.device import ACCELERATOR
from megatron_deepseek.torch_private import FSDPParam, fsdp_parameter_group


@dataclass(frozen=True)
class Unit:
    """A module that is gathered and reduced as one, the mesh it is sharded over, and the dtype it computes in.

    Units are listed inner before outer; an outer unit takes the parameters that no inner one took.
    """

    module: nn.Module
    mesh: DeviceMesh
    compute_dtype: torch.dtype | None = None


def shard_over_data(units: Iterable[Unit], reshard_after_forward: bool, shards_on_cpu: bool = False) -> None:
    """Shard each unit. `reshard_after_forward` frees gathered weights between forward and backward (ZeRO-3).

    With `shards_on_cpu` master weights, reduced gradients and with them the optimizer are on the CPU; weights are sent
    to the device in the master dtype to be gathered.

    With a lower `compute_dtype` the shards stay in the parameters' own dtype as master weights, and gradients
    accumulate and are reduced in it.
    """
    for unit in units:
        master = _master_dtype(unit.module)
        policy = MixedPrecisionPolicy(param_dtype=unit.compute_dtype, reduce_dtype=master,
                                      cast_forward_inputs=False)
        pinned = unit.mesh.device_type == ACCELERATOR
        offload = CPUOffloadPolicy(pin_memory=pinned) if shards_on_cpu else OffloadPolicy()
        fully_shard(unit.module, mesh=unit.mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy,
                    offload_policy=offload)
        if unit.mesh.size() > 1:
            unit.module.set_gradient_divide_factor(1.0)
        else:  # one rank divides nothing anyway, and a factor of 1 costs a pass
            unit.module.set_custom_reduce_scatter(_NothingToReduce())
        unit.module.set_force_sum_reduction_for_comms(True)
        for parameter in _parameters_of(unit.module):
            info = parameter._module_info
            gemm = getattr(info.module, "weight_gemms", {}).get(info.param_name)
            if gemm is not None and gemm.gathered is not None:
                _GatheredInAForm.wrap(parameter, gemm.gathered)


class _NothingToReduce:
    """The reduction over a mesh of one rank, for `set_custom_reduce_scatter`: what goes in is what comes out.

    FSDP2 asks for the memory of its input and then for that of its output, which are as large, and copies the one to
    the other. Given the same memory twice it copies nothing. The routed experts of most layouts are on such a mesh.
    """

    def __init__(self):
        self._input: torch.Tensor | None = None

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return new memory for an input, and for the output that is asked for after it the same."""
        if self._input is None:
            self._input = torch.empty(*size, dtype=dtype, device=device)
            return self._input
        given, self._input = self._input, None
        assert given.shape == torch.Size(size) and given.dtype == dtype, (given.shape, size, dtype)
        return given

    def __call__(self, *args, **kwargs) -> None:
        raise AssertionError("one rank has nothing to reduce")


def _master_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype in which the gradients of a unit are reduced, None if it trains nothing."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.requires_grad), None)


class _GatheredInAForm(FSDPParam):
    """A parameter whose shard is converted by `form` when it is gathered, and an ordinary tensor for everything else.

    FSDP2 asks the local tensor for fsdp_pre_all_gather and fsdp_post_all_gather. The usual way is a tensor subclass
    with these methods, which optimizer, checkpoints and initialisation would see as well; here FSDP alone sees it.
    """

    form: Callable[[torch.Tensor], Any]

    @classmethod
    def wrap(cls, parameter: FSDPParam, form: Callable[[torch.Tensor], Any]) -> None:
        parameter.__class__, parameter.form = cls, form
        parameter._init_extensions()

    @property
    def _sharded_local_tensor(self):
        return self.form(self._sharded_param_data.view(self.padded_sharded_param_size))


def _parameters_of(module: nn.Module) -> Iterator[FSDPParam]:
    """Yield FSDP's own records of the parameters of one unit."""
    group = fsdp_parameter_group(module)
    yield from group.fsdp_params if group else ()


def reshard(module: nn.Module) -> None:
    """Free gathered weights, which a forward without a backward leaves behind, so that parameters are shards again."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


@contextmanager
def gathered(unit: nn.Module) -> Iterator[None]:
    """Gather the weights of `unit` itself, not of units in it, for a `with` block; afterwards they are as they were."""
    group = fsdp_parameter_group(unit)
    if group is None or not group.is_sharded:
        yield
        return
    unit.unshard()
    yield
    unit.reshard()


def gathered_parameters(unit: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Yield the shard of each parameter of `unit` itself, and what it is while the unit is gathered, for a forward."""
    with gathered(unit):
        for parameter in _parameters_of(unit):
            yield parameter.sharded_param, parameter.unsharded_param


def _named_parameters_of(module: nn.Module) -> Iterator[tuple[str, FSDPParam]]:
    """Yield FSDP's own records of the parameters of all units in `module`, with their names there."""
    names = {each: name for name, each in module.named_modules()}
    for parameter in (each for unit in module.modules() for each in _parameters_of(unit)):
        place = parameter._module_info
        yield f"{names[place.module]}.{place.param_name}".removeprefix("."), parameter


def held_shards(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this rank's shards, with their weights' names in `module`, also of those that are gathered now."""
    for name, parameter in _named_parameters_of(module):
        yield name, _plain(parameter.sharded_param)


def gathered_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the memory of gathered weights, with their names in `module`, of those units that were gathered once; it
    may be empty now.
    """
    for name, parameter in _named_parameters_of(module):
        for tensor in (*parameter.all_gather_outputs, *parameter._unsharded_inner_tensors):
            yield name, tensor
        if hasattr(parameter, "_unsharded_param"):
            yield name, _plain(parameter._unsharded_param)


def held_gradients(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the gradients that are there, with their weights' names in `module`: of shards, and of gathered weights
    that are not reduced yet.
    """
    for name, parameter in _named_parameters_of(module):
        whole = getattr(parameter, "_unsharded_param", None)
        for each in (parameter.sharded_param.grad, parameter.unsharded_accumulated_grad,
                     None if whole is None else whole.grad):
            if each is not None:
                yield name, _plain(each)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor's own part, without a view, which operators on freed memory would make."""
    return getattr(tensor, "_local_tensor", tensor)


def gather_once(module: nn.Module) -> None:
    """Gather every unit of `module` whose forward is not going to run, and free it again.

    After backwards that only accumulate, FSDP asks all units for the gradients of their gathered parameters, even those
    that were never gathered, and fails on these (seen in torch 2.13).
    """
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.unshard()
            each.reshard()


def synchronize_gradients(module: FSDPModule, enabled: bool) -> None:
    """Choose whether the next backward reduces gradients over the data ranks or only accumulates them.

    If it only accumulates, gathered weights stay for the next forward, unless a forward already frees them.
    """
    module.set_requires_gradient_sync(enabled)
    module.set_reshard_after_backward(enabled or frees_after_forward(module))


def frees_after_forward(module: nn.Module) -> bool:
    """Return whether each forward of `module` frees the weights that it has gathered, so that backwards gather them."""
    return any(parameter.post_forward_mesh_info for each in module.modules() for parameter in _parameters_of(each))


def accumulate_gradients(module: nn.Module) -> None:
    """Add the gradients that parameters in the compute dtype hold now to the sums in the master dtype.

    FSDP does so at the end of a module's backward. Weight gradients that come later, in a W step, would otherwise add
    up in the compute dtype until the next backward ends.
    """
    for each in module.modules():
        for parameter in _parameters_of(each):
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()
