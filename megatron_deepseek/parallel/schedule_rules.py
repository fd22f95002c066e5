"""Where torch.distributed.pipelining's schedules place stages, and how many micro-batches they take, without torch.

A test holds these rules against torch's own constructors.
"""

VIRTUAL_STAGES = {"GPipe": 1, "1F1B": 1, "LoopedBFS": 2, "Interleaved1F1B": 2, "InterleavedZeroBubble": 2,
                  "ZBVZeroBubble": 2, "DualPipeV": 2}
SCHEDULES = tuple(VIRTUAL_STAGES)
INTERLEAVED = ("Interleaved1F1B", "InterleavedZeroBubble")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


def rank_of_stage(stage: int, num_stages: int, pp: int, schedule: str) -> int:
    """Return the pipeline rank that holds `stage`."""
    if schedule in V_SHAPED and num_stages == 2 * pp:
        return min(stage, num_stages - 1 - stage)
    return stage % pp


def stages_of_rank(rank: int, num_stages: int, pp: int, schedule: str) -> list[int]:
    """Return the stages that pipeline rank `rank` holds, in increasing order."""
    return [s for s in range(num_stages) if rank_of_stage(s, num_stages, pp, schedule) == rank]


def takes_virtual_stages(schedule: str, virtual_stages: int) -> bool:
    """Return whether a rank may hold that many stages; loops over several stages take any number from two."""
    least = VIRTUAL_STAGES[schedule]
    loops = least > 1 and schedule not in V_SHAPED
    return virtual_stages >= least if loops else virtual_stages == least


def takes_microbatches(schedule: str, pp: int, microbatches: int) -> bool:
    """Return whether `schedule` runs over `pp` ranks with that many micro-batches for each data rank."""
    if schedule == "1F1B":
        return microbatches >= pp
    if schedule == "DualPipeV":
        return microbatches >= 2 * pp
    if schedule in INTERLEAVED:
        return microbatches % max(1, microbatches // pp) == 0
    return True


def microbatch_rule(schedule: str, pp: int) -> str:
    """Return in words the rule that `takes_microbatches` applies."""
    if schedule in ("1F1B", "DualPipeV"):
        return f"at least one for each of its {pp * VIRTUAL_STAGES[schedule]} stages"
    return f"fewer than {pp}, or a number that divides into equal rounds of at least {pp}"
