"""Experts that are kept as bytes and made plain: one that stands for all takes what all take, at its fullest."""

from contextlib import nullcontext

import torch

from megatron_deepseek.dry_run.fake_tensors import nothing_computed
from megatron_deepseek.dry_run.plain_experts import one_expert_for_all
from megatron_deepseek.dry_run.storages import StorageLog
from megatron_deepseek.dry_run.timeline import bytes_over_time
from megatron_deepseek.ops import nf4
from megatron_deepseek.ops.frozen_weight import FrozenWeight, Nf4Form

EXPERTS, ROWS, COLUMNS = 3, 8, 128


def made_plain(changed) -> tuple[int, int, int]:
    """Return the bytes at the fullest moment, those that stay, and how many tensors were made."""
    log = StorageLog()
    with nothing_computed(gpu=False), changed, log.watching():
        codes = torch.empty(EXPERTS, ROWS, COLUMNS // 2, dtype=torch.uint8)
        scales = torch.empty(EXPERTS, ROWS, nf4.num_blocks(COLUMNS) + 8, dtype=torch.uint8)
        kept = FrozenWeight(Nf4Form(COLUMNS, double=True), codes, scales).dense(torch.bfloat16)
    assert kept.shape == (EXPERTS, ROWS, COLUMNS) and kept.dtype == torch.bfloat16
    return bytes_over_time(log).peak.bytes, sum(each.size for each in log.allocations), len(log.allocations)


def test_one_expert_takes_what_all_take():
    (peak, left, tensors), all_peak_left_tensors = made_plain(one_expert_for_all()), made_plain(nullcontext())
    assert (peak, left) == all_peak_left_tensors[:2] and left > 0
    assert 2 * tensors < all_peak_left_tensors[2]
