"""What a GPU needs beside what an allocator counts: CUDA's context, NCCL's buffers, fragments. All of it is a range.

Seen by others: 544 to 688 MB for a group of ranks on A100 (NVIDIA/nccl issue 964), 1.6 GB for the first and about 6 GB
with three and more (issue 864); 2 to 10 % of fragments with expandable segments, more without (arXiv 2502.07846 says 5
to 30 %, MindSpore's dry run 10.7 %). The context of CUDA is about half a GB.
"""

from dataclasses import dataclass

from megatron_deepseek.planning.job import Job

GB = 10**9
CONTEXT = 0.5 * GB
FRAGMENTS = (0.02, 0.10)
NCCL_GROUP = (0.25 * GB, 0.7 * GB)
NCCL_FIRST, NCCL_MOST = 1.0 * GB, 6.0 * GB


@dataclass(frozen=True)
class Range:
    """Bytes, from `low` to `high`."""

    low: float
    high: float


def groups_of_ranks(job: Job) -> int:
    """Return how many groups of several ranks communicate: an axis of a mesh that has them, and FSDP's two."""
    layout = job.layout
    sizes = [layout.pp, layout.dp * layout.cp, layout.tp, layout.cp]
    if job.model.n_routed_experts:
        sizes += [layout.ep, layout.edp, layout.etp]
    return sum(size > 1 for size in sizes)


def overheads(job: Job, allocated: float) -> Range:
    """Return what comes on top of `allocated` bytes."""
    groups = groups_of_ranks(job)
    nccl = (groups * NCCL_GROUP[0], min(NCCL_MOST, NCCL_FIRST + groups * NCCL_GROUP[1]) if groups else 0.0)
    low, high = (CONTEXT + nccl[at] + FRAGMENTS[at] * allocated for at in (0, 1))
    return Range(low, high)
