"""The schedule of forwards alone, for evaluation: any placement of stages on ranks, and few hidden states that wait."""

from collections.abc import Sequence

from torch.distributed.pipelining import PipelineStage

from megatron_deepseek.torch_private import (
    _Action,
    _add_send_recv,
    _add_unshard_reshard,
    _ComputationType,
    _PipelineScheduleRuntime,
)


def forward_order(ranks: Sequence[int], num_microbatches: int) -> dict[int, list[tuple[int, int]]]:
    """Return (stage, micro-batch) of each forward of each rank, in its order; `ranks` says who holds each stage.

    In every turn each rank takes, of the micro-batches that have reached its stages, one of the last such stage. So no
    more than two wait before any stage, however many there are. If each rank finished a stage before it began its next
    all would wait there; that takes as many turns, and fewer by less than one for each stage where the micro-batches
    do not divide into rounds.
    """
    order = {rank: [] for rank in sorted(set(ranks))}
    done = [0] * len(ranks)
    while done[-1] < num_microbatches:
        reached = [num_microbatches, *done[:-1]]
        for rank, forwards in order.items():
            stage = max((s for s, holder in enumerate(ranks) if holder == rank and done[s] < reached[s]), default=None)
            if stage is not None:
                forwards.append((stage, done[stage]))
                done[stage] += 1
    return order


class ForwardOnly(_PipelineScheduleRuntime):
    """A schedule of forwards alone, under any placement of stages, for evaluation."""

    def __init__(self, stages: list[PipelineStage], n_microbatches: int, loss_fn,
                 ranks: Sequence[int]):
        super().__init__(stages, n_microbatches, loss_fn=loss_fn, scale_grads=False)
        actions = {rank: [_Action(stage, _ComputationType.FORWARD, mb) for stage, mb in forwards]
                   for rank, forwards in forward_order(ranks, n_microbatches).items()}
        self.stage_index_to_group_rank = dict(enumerate(ranks))
        for stage in stages:
            stage.stage_index_to_group_rank = self.stage_index_to_group_rank
        self.pipeline_order_with_comms = _add_send_recv(
            {rank: _add_unshard_reshard(own) for rank, own in actions.items()},
            stage_to_rank=self.stage_index_to_group_rank.__getitem__, num_stages=len(ranks))
