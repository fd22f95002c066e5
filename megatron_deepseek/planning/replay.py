"""The most that a rank's activations take at once, found by going through its list of actions.

A forward adds what its backward will need. A whole backward ends with all of that free; one of input gradients keeps
what the weight gradients need until those are made. While a forward or a backward runs it needs more for a moment: a
layer that is recomputed, gradients on their way, logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_deepseek.planning.actions import Act


@dataclass(frozen=True)
class StageBytes:
    """What one micro-batch takes on one stage, in bytes.

    `kept` from its forward to its backward; `waiting` of input gradients' backward is left until the weight gradients
    are made; `forward` and `backward` exist beside it only while these run.
    """

    kept: int = 0
    waiting: int = 0
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Peak:
    """The most bytes, in which act of the list, how many micro-batches each stage keeps at that moment, and the parts
    that the bytes are the sum of: kept, waiting, and what exists only while the act runs.
    """

    bytes: int = 0
    act: int = 0
    in_flight: Mapping[int, int] = field(default_factory=dict)
    kept: int = 0
    waiting: int = 0
    running: int = 0


def replay(acts: Sequence[Act], stages: Mapping[int, StageBytes]) -> Peak:
    """Return the peak of a rank that does `acts` on `stages`.

    The two runs of a pair are taken to be at their peaks together, and the pair's forward to be kept before its
    backward frees anything: so they overlap at the worst.
    """
    kept = dict.fromkeys(stages, 0)
    waiting = dict.fromkeys(stages, 0)
    best = Peak()
    for number, act in enumerate(acts):
        for run in act:
            kept[run.stage] += run.kind == "F"
        running = sum(stages[run.stage].forward if run.kind == "F" else stages[run.stage].backward
                      for run in act if run.kind != "W")
        held = sum(count * stages[stage].kept for stage, count in kept.items())
        left = sum(count * stages[stage].waiting for stage, count in waiting.items())
        if held + left + running > best.bytes:
            best = Peak(held + left + running, number, {s: count for s, count in kept.items() if count}, held, left,
                        running)
        for run in act:
            kept[run.stage] -= run.kind in "BI"
            waiting[run.stage] += (run.kind == "I") - (run.kind == "W")
    assert not any(kept.values()) and not any(waiting.values()), "a micro-batch without its backward"
    return best


def most_in_flight(acts: Sequence[Act], stages: Sequence[int]) -> int:
    """Return how many forwards of any of `stages` wait for the end of their backward at the same time, at most."""
    return replay(acts, {stage: StageBytes(kept=1, waiting=1) for stage in stages}).bytes
