"""The bytes of weights, gradients and moments of a trainer, looked at whenever an operator runs."""

from collections.abc import Iterator

import torch
from saved_bytes import identity
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_deepseek.torch_private import fsdp_parameter_group
from megatron_deepseek.training.optimizer import MOMENTS
from megatron_deepseek.training.trainer import Trainer


class StatesSeen(TorchDispatchMode):
    """While it is entered, finds in `states` the bytes of each part at the moment when all together were the largest.

    They are weights, gathered weights, sums of gradients, reduced gradients and moments. `most` is the largest that
    there was of these and of what lives shortly: whole gradients in the layers' dtype that are about to be added to the
    sums, and copies of sums that are about to be reduced.
    """

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.states: dict[str, int] = {}
        self.most = 0
        self._trainer = trainer
        self._copies: list[tuple[StorageWeakRef, int]] = []
        self._parameters = [each for stage in trainer.stages for unit in stage.modules() if isinstance(unit, FSDPModule)
                            for group in [fsdp_parameter_group(unit)] if group for each in group.fsdp_params]

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        if operator.namespace == "fsdp" and operator.overloadpacket.__name__ == "chunk_cat":
            self._copies.append((StorageWeakRef(kwargs["out"].untyped_storage()), kwargs["out"].nbytes))
        self._look()
        return result

    def _look(self) -> None:
        states, shortly, seen = {}, 0, set()
        for name, tensor in self._held():
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            if identity(storage) not in seen:
                seen.add(identity(storage))
                if name is None:
                    shortly += storage.nbytes()
                else:
                    states[name] = states.get(name, 0) + storage.nbytes()
        self._copies = [(copy, size) for copy, size in self._copies if not copy.expired()]
        shortly += sum(size for copy, size in self._copies if copy.cdata not in seen)
        total = sum(states.values())
        self.most = max(self.most, total + shortly)
        if total > sum(self.states.values()):
            self.states = states

    def _held(self) -> Iterator[tuple[str | None, torch.Tensor]]:
        for each in self._parameters:
            yield "weights", each.sharded_param
            for tensor in each.all_gather_outputs:
                yield "gathered", tensor
            if each.unsharded_accumulated_grad is not None:
                yield "sums", each.unsharded_accumulated_grad
            gradient = getattr(each, "_unsharded_param", None)
            gradient = None if gradient is None else gradient.grad
            if gradient is not None:
                yield "sums" if each.reduce_dtype in (None, gradient.dtype) else None, gradient
            if each.sharded_param.grad is not None:
                yield "reduced", each.sharded_param.grad
        for state in self._trainer.optimizer.state.values():
            for moment in MOMENTS:
                yield "moments", state[moment]
