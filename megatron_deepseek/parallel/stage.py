"""A pipeline stage whose last backward reduces gradients over the data ranks layer by layer, as it would without a
pipeline: while layers before are still at work.

PyTorch's own stage keeps FSDP from reducing in any backward, and reduces all layers when the last one has ended
(REDUCE_GRAD). Where weight gradients are deferred that is as early as it can be, for they are made after the backward;
so such stages are left to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from megatron_deepseek.parallel.data import reshard
from megatron_deepseek.torch_private import stage_backward


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """What the forward of each micro-batch gets beside hidden states. An object, not a list, so that schedules, which
    cut tensors and look into lists, hand it on as it is.
    """

    items: Sequence[Any]


class ReducingStage(PipelineStage):
    """Read in torch 2.13: every schedule says which backward of a stage is its last, of all micro-batches. Gradients
    are sums, so there is no factor to scale them by.

    A stage that ends before the first trained parameter has no backward; the schedule's are nothing but an end to its
    gathered weights.
    """

    submod: FSDPModule

    def forward_one_chunk(self, fwd_chunk_id: int, args: tuple, kwargs: dict, save_forward_output: bool = True):
        """The schedule hands the same `micro_batches` to every forward; this picks the one whose turn it is."""
        chosen = {**kwargs, "micro_batch": kwargs["micro_batches"].items[fwd_chunk_id]}
        del chosen["micro_batches"]
        return super().forward_one_chunk(fwd_chunk_id, args, chosen, save_forward_output)

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False):
        if not self.is_last and not any(output.requires_grad for output in bwd_kwargs["stage_output"]):
            if last_backward:
                reshard(self.submod)
            return (None,) * len(bwd_kwargs["input_values"]), None
        if self.dw_builder or not last_backward:
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        assert backward_type == "full", backward_type
        self.submod.set_is_last_backward(True)
        self.submod.set_reshard_after_backward(True)
        self.submod.set_requires_gradient_sync(True)
        return stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]), None

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.dw_builder:
            super().perform_reduce_grad(grad_scale_factor)

    def _get_init_p2p_neighbors_ops(self) -> list:
        """Of torch 2.11, which under V-shaped schedules sends to the rank itself; gloo has no such connection."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]
