"""What an engine counts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Statistics:
    """Counts since the engine was made; `running`, `waiting` and `blocks_used` are of now.

    `shared_tokens`: of prompts, that were found in the cache. Drafts are counted by place after the last token.
    """

    running: int
    waiting: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    blocks_used: int
    blocks: int
    shared_tokens: int
    drafts_proposed: tuple[int, ...]
    drafts_accepted: tuple[int, ...]


def total(statistics: Sequence[Statistics]) -> Statistics:
    """Return the counts of several engines together."""
    sums = {}
    for name in (field.name for field in fields(Statistics)):
        values = [getattr(each, name) for each in statistics]
        sums[name] = tuple(map(sum, zip(*values))) if isinstance(values[0], tuple) else sum(values)
    return Statistics(**sums)
