"""A pipeline stage whose last backward reduces gradients over the data ranks layer by layer, as it would without a
pipeline: while earlier layers are still computing. And one that has memory for what arrives only while it needs it.

PyTorch's own stage keeps FSDP from reducing in any backward, and reduces all layers when the last backward has ended
(REDUCE_GRAD). Where weight gradients are deferred nothing earlier is possible, since they are computed after the
backward; so such stages are left to PyTorch.

It also leaves all weights of a stage gathered behind every backward but the last. Here weights that each forward frees
are freed layer by layer by each backward as well.

It also makes receive buffers for every micro-batch of a step before the first, and keeps them: of V3 with 1,920
micro-batches half a terabyte. Here a buffer is made when its receive is started. Hidden states are from then on the
graph's, gradients the backward's, and freed with it.

It also keeps what a forward took and returned until the backward, and where there is none, in evaluation, until the
next step. Here a stage that only goes forward keeps them until its next forward.

And its runtime for several stages keeps the handles of all sends until the step ends. Gloo's handle of a send keeps
what was sent until somebody waits, so that hidden states and gradients of all micro-batches add up; NCCL lets go of
what has been sent by itself. Here a stage sends by itself, and waits for a send when it begins the next one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from megatron_deepseek.parallel.data import frees_after_forward, reshard
from megatron_deepseek.parallel.watch import Act, Watch, unwatched
from megatron_deepseek.torch_private import _batch_p2p, _wait_batch_p2p, stage_backward


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """What the forward of each micro-batch receives besides hidden states.

    It is an object, not a list, because schedules divide tensors and look into lists, and pass other objects on
    unchanged.
    """

    items: Sequence[Any]


class ReducingStage(PipelineStage):
    """A stage of torch.distributed.pipelining that reduces in its last backward, and allocates what it receives late.

    Until a receive is started its buffer is on the meta device, and again once the forward or backward has taken it.

    It relies on what torch 2.13 does: every schedule says which backward of a stage is its last, of all micro-batches.
    Gradients are sums, so there is no factor to scale them by.

    A stage that ends before the first trained parameter has no backward; the schedule's last one only frees its
    gathered weights.
    """

    submod: FSDPModule

    def __init__(self, *args, watch: Watch = unwatched, **kwargs):
        """Make PipelineStage's stage, of whose acts `watch` is told."""
        super().__init__(*args, **kwargs)
        self._watch = watch

    def _prepare_forward_infra(self, *args, **kwargs):
        with self._described_only():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args, **kwargs):
        with self._described_only():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextmanager
    def _described_only(self) -> Iterator[None]:
        """Make buffers on the meta device meanwhile."""
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list:
        if self.has_backward:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple, mb_index: int) -> None:
        self._allocate([info for info, gradient in zip(self.grad_recv_info[mb_index], next_stage_bwd_outputs)
                        if gradient is None])  # torch writes zeros into their buffers
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple:
        activations = super()._retrieve_recv_activations(fwd_chunk_id)
        self._let_go(self.args_recv_info[fwd_chunk_id])
        return activations

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple:
        gradients = super()._retrieve_recv_grads(bwd_chunk_id)
        self._let_go(self.grad_recv_info[bwd_chunk_id])
        return gradients

    def _allocate(self, infos: Sequence) -> None:
        """Give memory to the buffers of receives that are about to start."""
        _place_buffers(infos, self.device)

    def _let_go(self, infos: Sequence) -> None:
        """Leave what was received to whoever has taken it."""
        _place_buffers(infos, torch.device("meta"))

    def forward_one_chunk(self, fwd_chunk_id: int, args: tuple, kwargs: dict, save_forward_output: bool = True):
        """Run the forward with its own micro-batch: the schedule passes the same `micro_batches` to every forward."""
        chosen = {**kwargs, "micro_batch": kwargs["micro_batches"].items[fwd_chunk_id]}
        del chosen["micro_batches"]
        if not self.has_backward:
            self.fwd_cache.clear()  # what the forward before it returned has been sent, or passed on
        with self._watch(Act("F", self.stage_index, fwd_chunk_id)):
            return super().forward_one_chunk(fwd_chunk_id, args, chosen, save_forward_output)

    def backward_one_chunk(self, bwd_chunk_id: int, loss=None, full_backward: bool = True,
                           last_backward: bool = False):
        """Run the backward, or with `full_backward` false that of the inputs alone."""
        with self._watch(Act("B" if full_backward else "I", self.stage_index, bwd_chunk_id)):
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False):
        """Make the weight gradients that the backward of the inputs has left."""
        with self._watch(Act("W", self.stage_index, bwd_chunk_id)):
            return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False):
        if not self.is_last and not any(output.requires_grad for output in bwd_kwargs["stage_output"]):
            if last_backward:
                reshard(self.submod)
            return (None,) * len(bwd_kwargs["input_values"]), None
        if self.dw_builder or not (last_backward or frees_after_forward(self.submod)):
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        assert backward_type == "full", backward_type
        self.submod.set_is_last_backward(last_backward)
        self.submod.set_reshard_after_backward(True)
        self.submod.set_requires_gradient_sync(last_backward)
        return stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]), None

    def finish_step(self) -> None:
        """Let go of what an evaluation's last forward has left; a backward has taken what it needed."""
        self.fwd_cache.clear()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.dw_builder:
            super().perform_reduce_grad(grad_scale_factor)

    def _get_init_p2p_neighbors_ops(self) -> list:
        """Return the first connections without those to the rank itself, for torch 2.11.

        It makes such connections under V-shaped schedules; gloo has none.
        """
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class SendingStage(ReducingStage):
    """A stage that sends by itself what torch's runtime for several stages would send, and lets go of it early.

    No rank waits for ever for a send before its last one: the runtime's lists have each receive in the turn of its
    send, before all that needs what is sent or computed later, so they could be run with sends that wait at once.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sent: dict[str, list[dist.Work]] = {"F": [], "B": []}

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list:
        """Send the output of a forward; return nothing for the runtime to send."""
        return self._send("F", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list:
        """Send the gradient of a backward's input; return nothing for the runtime to send."""
        return self._send("B", super().get_bwd_send_ops(bwd_chunk_id))

    def finish_step(self) -> None:
        """Wait for all that has been sent."""
        super().finish_step()
        for kind in self._sent:
            self._wait(kind)

    def _send(self, kind: str, ops: list[dist.P2POp]) -> list:
        if self.device.type != "cuda":
            self._wait(kind)
        self._sent[kind] += _batch_p2p(ops)
        return []

    def _wait(self, kind: str) -> None:
        _wait_batch_p2p(self._sent[kind])
        self._sent[kind] = []


def _place_buffers(infos: Sequence, device: torch.device) -> None:
    """Replace the buffer of each receive by an empty one on `device`; a stage's own inputs have none."""
    for info in infos:
        buffer = getattr(info, "buffer", None)
        if buffer is not None:
            info.buffer = torch.empty_like(buffer, device=device).requires_grad_(buffer.requires_grad)
