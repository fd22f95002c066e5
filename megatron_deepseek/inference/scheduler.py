"""Chooses the tokens of the next forward: continuous batching with chunked prefill and preemption.

Each step takes every running answer's next token with its drafts, then, as far as the token budget goes, chunks of
prompts, all in order of arrival. A request is admitted once there are blocks for all of it, and once no other one
computes a block that it can share. Where blocks run out, the youngest running sequence gives up its own and is computed
again later.
"""

import time
from bisect import insort
from dataclasses import dataclass

from megatron_deepseek.inference.batch import Piece
from megatron_deepseek.inference.blocks import BlockPool, block_hashes
from megatron_deepseek.inference.request import Sequence
from megatron_deepseek.inference.settings import EngineSettings


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens `begin` to `begin + length` of a sequence, its drafts counted after its own tokens."""

    sequence: Sequence
    begin: int
    length: int

    @property
    def end(self) -> int:
        return self.begin + self.length

    @property
    def kept(self) -> int:
        """Return up to where what was computed stays: without drafts that turned out wrong."""
        return min(self.end, len(self.sequence.tokens) - 1)

    @property
    def samples(self) -> bool:
        """Return whether the last of the sequence's own tokens is among them, after which one is sampled."""
        return self.end >= len(self.sequence.tokens)

    @property
    def piece(self) -> Piece:
        """Return its tokens for a forward, drafts after the sequence's own."""
        sequence, own = self.sequence, len(self.sequence.tokens)
        tokens = sequence.tokens[self.begin:self.end]
        return Piece([*tokens, *sequence.drafts[:max(self.end - own, 0)]], sequence.blocks, self.begin)


class Scheduler:
    """Sequences that wait and that run, both in order of arrival, and the blocks that they hold."""

    def __init__(self, settings: EngineSettings, pool: BlockPool):
        self.settings, self.pool = settings, pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.shared_tokens = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def schedule(self) -> list[Span]:
        """Return the spans of the next forward, whose sequences hold blocks for them."""
        spans: dict[Sequence, Span] = {}
        before, left = self.preemptions, self.settings.token_budget
        for sequence in sorted(self.running, key=lambda each: (not each.decoding, each.order)):
            length = min(sequence.pending, left)
            if length and sequence in self.running and self._make_room(sequence, length, spans):
                spans[sequence] = Span(sequence, sequence.num_computed, length)
                left = left - length if self.preemptions == before else self._budget(spans)
        if self.preemptions == before:
            self._admit(spans)
        assert spans or not (self.running or self.waiting), "there is work, and none is done"
        return list(spans.values())

    def _budget(self, spans: dict[Sequence, Span]) -> int:
        return self.settings.token_budget - sum(span.length for span in spans.values())

    def advance(self, sequence: Sequence, num_computed: int) -> None:
        """Say that the cache has the first `num_computed` tokens; others may share its full blocks from now on."""
        sequence.num_computed = num_computed
        if not self.settings.prefix_sharing:
            return
        full = num_computed // self.settings.block_size
        if full > sequence.num_registered:
            self._know_hashes(sequence, full * self.settings.block_size)
            for place in range(sequence.num_registered, full):
                self.pool.register(sequence.blocks[place], sequence.hashes[place])
            sequence.num_registered = full

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free(sequence)

    def _make_room(self, sequence: Sequence, length: int, spans: dict[Sequence, Span]) -> bool:
        """Give a sequence blocks for `length` more tokens; return False if it had to give up its own instead."""
        missing = self._blocks_for(sequence.num_computed + length) - len(sequence.blocks)
        while missing > self.pool.available:
            youngest = max(self.running, key=_order)
            self._preempt(youngest)
            spans.pop(youngest, None)
            if youngest is sequence:
                return False
        sequence.blocks += self.pool.allocate(max(missing, 0))
        return True

    def _admit(self, spans: dict[Sequence, Span]) -> None:
        """Let waiting sequences run, in order, as long as there are blocks, places and tokens of the budget left."""
        computed_now = {each for each in map(_next_block, self.running) if each is not None}
        for sequence in list(self.waiting):
            budget = self._budget(spans)
            if not budget or len(self.running) >= self.settings.max_running:
                return
            shared, rest = self._shared_blocks(sequence)
            if rest and rest[0] in computed_now:  # it can share that block too, once it is there
                self.pool.release(shared)
                continue
            if self._blocks_for(len(sequence.tokens)) - len(shared) > self.pool.available:
                self.pool.release(shared)
                return
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_order)
            sequence.admitted_at = sequence.admitted_at or time.monotonic()
            sequence.blocks, sequence.num_registered = shared, len(shared)
            sequence.num_computed = sequence.num_filled = len(shared) * self.settings.block_size
            length = min(sequence.pending, budget)
            sequence.blocks += self.pool.allocate(
                max(self._blocks_for(sequence.num_computed + length) - len(shared), 0))
            spans[sequence] = Span(sequence, sequence.num_computed, length)
            computed_now.add(_next_block(sequence))
            self.shared_tokens += sequence.num_computed

    def _shared_blocks(self, sequence: Sequence) -> tuple[list[int], list[bytes]]:
        """Return blocks that have the sequence's first tokens, and the hashes of those that it could share beside them.

        What is read of a token is computed: the logits of the last one, and of a prompt's that are asked for.
        """
        if not self.settings.prefix_sharing:
            return [], []
        self._know_hashes(sequence, len(sequence.tokens) - 1)
        parameters, most = sequence.parameters, len(sequence.tokens) - 1
        if parameters.prompt_logprobs is not None and not sequence.index:
            most = min(most, sequence.request.prompt_reading.place)
        hashes = sequence.hashes[:most // self.settings.block_size]
        shared = self.pool.share(hashes)
        return shared, hashes[len(shared):]

    def _know_hashes(self, sequence: Sequence, tokens: int) -> None:
        """Compute the hashes of the full blocks of a sequence's first `tokens` tokens, as far as they are not known.

        Sequences whose experts are kept share blocks among themselves: of others' tokens no experts are known.
        """
        if len(sequence.hashes) < tokens // self.settings.block_size:
            root = b"experts" if sequence.parameters.chosen_experts else b""
            sequence.hashes = block_hashes(sequence.tokens[:tokens], self.settings.block_size, sequence.hashes, root)

    def _blocks_for(self, tokens: int) -> int:
        """Return how many blocks `tokens` tokens take, and the drafts that may follow."""
        return -(-(tokens + self.settings.draft_tokens) // self.settings.block_size)

    def _preempt(self, sequence: Sequence) -> None:
        """Free a running sequence's blocks and let it wait; it will be computed again from its tokens."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._free(sequence)
        sequence.num_computed = sequence.num_filled = 0
        sequence.drafts = []
        self.add(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.num_registered = [], 0


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _next_block(sequence: Sequence) -> bytes | None:
    """Return the hash of the block that a running sequence fills next, None if all of its prompt's are full."""
    return sequence.hashes[sequence.num_registered] if sequence.num_registered < len(sequence.hashes) else None
