"""A pipeline stage whose last backward reduces gradients over the data ranks layer by layer, as it would without a
pipeline: while earlier layers are still computing.

PyTorch's own stage keeps FSDP from reducing in any backward, and reduces all layers when the last backward has ended
(REDUCE_GRAD). Where weight gradients are deferred nothing earlier is possible, since they are computed after the
backward; so such stages are left to PyTorch.
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
    """What the forward of each micro-batch receives besides hidden states.

    It is an object, not a list, because schedules divide tensors and look into lists, and pass other objects on
    unchanged.
    """

    items: Sequence[Any]


class ReducingStage(PipelineStage):
    """A stage of torch.distributed.pipelining that reduces in its last backward.

    It relies on what torch 2.13 does: every schedule says which backward of a stage is its last, of all micro-batches.
    Gradients are sums, so there is no factor to scale them by.

    A stage that ends before the first trained parameter has no backward; the schedule's last one only frees its
    gathered weights.
    """

    submod: FSDPModule

    def forward_one_chunk(self, fwd_chunk_id: int, args: tuple, kwargs: dict, save_forward_output: bool = True):
        """Run the forward with its own micro-batch: the schedule passes the same `micro_batches` to every forward."""
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
        """Return the first connections without those to the rank itself, for torch 2.11.

        It makes such connections under V-shaped schedules; gloo has none.
        """
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]
