"""A step from operations that were measured: their sums on a rank, put in the order of a schedule.

Table 4 of "Insights into DeepSeek-V3" (arXiv 2505.09343) has such sums: seconds of a step in forwards alone (1F), whole
backwards alone (1B), weight gradients (1W) and pairs (1F1B). Backwards of inputs alone are not told apart there: they
are taken to be part of 1B, and as long as a whole one less its weight gradients.
"""

from collections import Counter
from collections.abc import Mapping

from megatron_deepseek.planning.actions import Act, actions, num_stages
from megatron_deepseek.planning.simulation import simulate


def step_of_operations(schedule: str, pp: int, micro_batches: int, sums: Mapping[str, float]) -> float:
    """Return the seconds of a step whose ranks spend `sums` on F, B, W and pairs on average; stages are equal and
    messages take no time.
    """
    seconds = means_of(schedule, pp, micro_batches, sums)
    acts = [actions(schedule, pp, 2, micro_batches, rank) for rank in range(pp)]
    spans = simulate(acts, lambda rank, act: seconds[_name(act)], num_stages(schedule, pp, 2) - 1)
    return max(each[-1].end for each in spans)


def means_of(schedule: str, pp: int, micro_batches: int, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of one operation of each name. `sums["B"]` is of whole backwards and of those of inputs alone,
    which take I = B - W; `sums["W"]` is of weight gradients by themselves.
    """
    counts = Counter(_name(act) for rank in range(pp) for act in actions(schedule, pp, 2, micro_batches, rank))
    each = {name: count / pp for name, count in counts.items()}
    forward, pair = sums["F"] / each["F"], sums["pair"] / each["pair"]
    weights = sums["W"] / each["W"]
    backward = (sums["B"] + each["I"] * weights) / (each["B"] + each["I"])
    return {"F": forward, "pair": pair, "W": weights, "B": backward, "I": backward - weights}


def _name(act: Act) -> str:
    return "pair" if len(act) > 1 else act[0].kind
