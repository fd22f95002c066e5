"""What an engine counts."""

from dataclasses import dataclass


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
