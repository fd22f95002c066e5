"""How an engine is set up: lengths, memory and how much work a step does."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """The sizes of an engine. A value that cannot be raises ValueError with its name.

    `max_length`: tokens of the longest prompt with its answer. The cache has `num_blocks` blocks of `block_size`
    tokens, or as many as `cache_bytes` hold, or else enough for `max_running` requests of `max_length`, within 1 GiB.
    `token_budget`: tokens of one forward, of running answers and chunks of prompts; `max_running`: requests at a time.
    `prefix_sharing`: requests share the blocks of equal beginnings. `draft_tokens`: how many tokens MTP modules draft
    for a step; 0 for no speculation.
    """

    max_length: int
    block_size: int = 16
    num_blocks: int | None = None
    cache_bytes: int | None = None
    token_budget: int = 512
    max_running: int = 64
    prefix_sharing: bool = True
    draft_tokens: int = 0

    def __post_init__(self):
        least = {"max_length": 2, "block_size": 1, "num_blocks": 1, "cache_bytes": 1, "token_budget": 1,
                 "max_running": 1, "draft_tokens": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} is {value}; it must be at least {bound}")
        if self.num_blocks is not None and self.num_blocks * self.block_size < self.slots_of_request:
            raise ValueError(f"num_blocks {self.num_blocks} of {self.block_size} tokens do not hold one request of "
                             f"max_length {self.max_length}")

    @property
    def slots_of_request(self) -> int:
        """Return the most slots of the cache that a request takes, with those of its drafts."""
        return self.max_length + self.draft_tokens
