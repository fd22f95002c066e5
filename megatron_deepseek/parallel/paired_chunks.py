"""DualPipeV's paired chunks: overlap the forward of one micro-batch with the backward of another.

PyTorch's runtime knows such pairs (OVERLAP_F_B) and runs one half after the other, unless it is given a function that
runs them another way. This file has that function; for each half it does what the runtime does.
"""

from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.torch_private import _Action, _ComputationType, _PipelineContext, _wait_batch_p2p


def overlap_pairs(schedule, overlap: MicroBatchOverlap) -> None:
    """Make `schedule`, a runtime of torch.distributed.pipelining, overlap the halves of its pairs."""
    schedule.register_custom_function(_ComputationType.OVERLAP_F_B,
                                      lambda action, context: _run(action, context, overlap))


def _run(action: _Action, context: _PipelineContext, overlap: MicroBatchOverlap) -> None:
    forward, backward = action.sub_actions
    schedule = context.schedule_ref
    stages = {stage.stage_index: stage for stage in schedule._stages}
    for half, received in ((forward, schedule.fwd_recv_ops), (backward, schedule.bwd_recv_ops)):
        schedule._assert_unsharded(stages[half.stage_index])
        key = half.stage_index, half.microbatch_index
        if key in received:
            _wait_batch_p2p(received.pop(key))
    overlap.run(lambda: _forward(schedule, stages, forward, context), lambda: _backward(schedule, stages, backward))


def _forward(schedule, stages: dict, action: _Action, context: _PipelineContext) -> None:
    stage, number = stages[action.stage_index], action.microbatch_index
    output = stage.forward_one_chunk(number, context.arg_mbs[number], context.kwarg_mbs[number],
                                     save_forward_output=False)
    schedule._maybe_compute_loss(stage, output, context.target_mbs, number)
    if action.stage_index + 1 in stages:  # the bottom of the V: the next stage is on this rank
        stages[action.stage_index + 1].set_local_fwd_input(output, number)


def _backward(schedule, stages: dict, action: _Action) -> None:
    stage, number = stages[action.stage_index], action.microbatch_index
    schedule.backward_counter[action.stage_index] += 1
    last = schedule.backward_counter[action.stage_index] == schedule._n_microbatches
    stage.backward_one_chunk(number, loss=schedule._maybe_get_loss(stage, number), full_backward=True,
                             last_backward=last)
    if action.stage_index - 1 in stages:
        stages[action.stage_index - 1].set_local_bwd_input(stage.get_local_bwd_output(number), number)
