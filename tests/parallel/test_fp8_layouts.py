"""FP8 training in layouts against one process, in float64: nothing rounds but what is quantised.

Tiles are of 128. Where every shard is whole tiles, and the rows that a weight gradient is made of are the same ones in
the same order, a layout quantises what one process does.
"""

import pytest
import torch
from cases import Case
from compare import differences
from fp8_job import WideCase, run_fp8, run_fp8_alone, run_small_tiles, run_small_tiles_alone
from test_precision import BFLOAT16_CASES, losses

from megatron_deepseek.model.build import Precision
from megatron_deepseek.parallel import expert

FP8_CASES = BFLOAT16_CASES  # in which every feature is used
BF16_TOO = Case(dp=2, microbatches=2)

# Sums in another order differ by 1e-15, which may round the float32 scale of a tile the other way: 6e-8 of what is in it.
# A tile cut elsewhere changes gradients by 1e-2, gradients of experts that were re-tiled by another road by 2e-7.
TOLERANCE = 1e-7

# (case, sequences in a micro-batch of the one process). All expert ranks' rows of a micro-batch meet in one weight
# gradient, so two data ranks of one expert group are one process's micro-batch of both sequences.
ALIGNED = (
    (WideCase(pp=2, schedule="InterleavedZeroBubble", virtual=2, microbatches=2, recompute="full",
              q_lora=False), 1),
    (WideCase(pp=2, schedule="ZBVZeroBubble", virtual=2, microbatches=2, mtp=1, shared=2,
              recompute="layernorm,mla_up_proj,moe_act"), 1),
    (WideCase(tp=2, sp=True, ep=2, microbatches=2, mtp=1, shared=2, packed=True, length=256), 1),
    (WideCase(dp=2, ep=2), 2),
    (WideCase(dp=2, ep=2, dispatcher="allgather", reshard=True), 2),
    (WideCase(dp=2, ep=2, dispatcher="grouped"), 2),
)


@pytest.fixture(scope="module")
def alone(ranks):
    """The record of one process, computed once for each model and data."""
    records = {}

    def record(case: WideCase, micro_batch_size: int):
        key = case.model, case.loss, case.packed, case.global_batch_size, micro_batch_size
        if key not in records:
            (records[key],) = ranks.run(1, run_fp8_alone, case, micro_batch_size)
        return records[key]

    return record


@pytest.mark.parametrize("case, micro_batch_size", ALIGNED, ids=str)
def test_whole_tiles_compute_what_one_process_does(ranks, alone, case, micro_batch_size):
    records = ranks.run(case.layout.world_size, run_fp8, case)
    assert not differences(records, alone(case, micro_batch_size), TOLERANCE)


@pytest.mark.parametrize("case", FP8_CASES, ids=str)
def test_every_feature(ranks, case):
    """Tiles of the forward lie in one token: its losses are one process's, and so is the choice of experts. Afterwards
    weight gradients have had other tiles, of other micro-batches: losses within 1 %; 3e-3 was seen.
    """
    (reference,) = ranks.run(1, run_small_tiles_alone, case)
    for record in ranks.run(case.layout.world_size, run_small_tiles, case):
        torch.testing.assert_close(losses(record)[0], losses(reference)[0], rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(losses(record), losses(reference), rtol=1e-2, atol=0)
        for layer, counts in record.steps[0].expert_counts.items():
            assert torch.equal(counts, reference.steps[0].expert_counts[layer])


def test_over_bfloat16(ranks):
    """As tests of bfloat16 alone."""
    precision = Precision(torch.float32, torch.bfloat16, fp8=True)
    (reference,) = ranks.run(1, run_small_tiles_alone, BF16_TOO, precision)
    for record in ranks.run(2, run_small_tiles, BF16_TOO, precision):
        torch.testing.assert_close(losses(record), losses(reference), rtol=2e-2, atol=0)


def worst(records, reference) -> tuple[float, float]:
    """Largest relative difference of the loss, and of any gradient by its norm."""
    (expected,) = reference.steps
    (step,) = records[0].steps
    gradients = [((step.gradients[0, name] - wanted).norm() / wanted.norm()).item()
                 for (_, name), wanted in expected.gradients.items() if wanted.norm() > 0]
    return abs(step.losses.lm_loss / expected.losses.lm_loss - 1), max(gradients)


def test_other_rows_in_a_tile_change_weight_gradients_alone(ranks, alone):
    """Context parallelism deals chunks of 64 tokens, and quantises each rank's part of the latents' gradients by
    itself. The forward's tiles are rows of their own, so the loss is one process's to the last digits; gradients
    differ by rounding to E4M3: 2^-4 at most in an element, less in sums of them.
    """
    case = WideCase(cp=2, router="dense", length=256)
    loss, gradient = worst(ranks.run(2, run_fp8, case), alone(case, 1))
    assert loss < 1e-12 and 1e-4 < gradient < 0.1


def test_shards_that_are_no_whole_tiles_round_otherwise(ranks, alone):
    """160 features over two ranks: tiles of 80 and 80 instead of 128 and 32. Both are FP8 of the same numbers, so they
    differ by no more than each does from the exact result: gradients of this model by 0.15.
    """
    case = WideCase(tp=2, router="dense", width=160)
    loss, gradient = worst(ranks.run(2, run_fp8, case), alone(case, 1))
    assert 1e-9 < loss < 1e-3 and 1e-2 < gradient < 0.2


def run_and_list(case: WideCase) -> list[tuple[torch.dtype, int]]:
    """The rows that this rank's all-to-alls of tokens moved, forwards and backwards, as (dtype, columns)."""
    moved, exchange = [], expert.dist.all_to_all_single

    def listed(out, given, *args, **kwargs):
        if given.ndim == 2:
            moved.append((given.dtype, given.shape[1]))
        return exchange(out, given, *args, **kwargs)

    expert.dist.all_to_all_single = listed
    run_fp8(case)
    return moved


def test_dispatch_is_fp8_and_combine_is_not(ranks):
    """One layer of experts: in the forward tokens, in the backward the gradients of results go to the experts as codes
    and scales; results, and gradients of tokens, come back in the layer's dtype. Then an evaluation's forward.
    """
    forward = [(torch.uint8, 256), (torch.float32, 256 // 128), (torch.float64, 256)]
    moved = ranks.run(2, run_and_list, WideCase(dp=2, ep=2))[0]
    assert moved == forward + forward + forward
