"""The blocks of the cache: who holds each, which hold the same tokens, and which is given up next.

A block has room for `block_size` tokens in every layer. Requests that begin alike share blocks: a full block is known
by the hash of its tokens and of the block before it, so that equal hashes mean equal beginnings. A block that nobody
holds any more keeps its tokens until it is needed; the one that was used longest ago goes first.

Block 0 is nobody's: padding is written to it and read from it.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0


def block_hashes(tokens: Sequence[int], block_size: int, known: list[bytes], root: bytes = b"") -> list[bytes]:
    """Return the chained hash of every full block of `tokens`; `known` are those of the first blocks. Chains of another
    `root` have no hash in common.
    """
    hashes = list(known)
    for begin in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        parent = hashes[-1] if hashes else root
        ids = array("q", tokens[begin:begin + block_size]).tobytes()
        hashes.append(hashlib.blake2b(parent + ids, digest_size=16).digest())
    return hashes


class BlockPool:
    """Blocks 1 to `num_blocks`, each held by as many sequences as its reference count says."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._empty = list(range(num_blocks, NULL_BLOCK, -1))  # the last one is given out first
        self._references = [0] * (num_blocks + 1)
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # full blocks that nobody holds, oldest first

    @property
    def available(self) -> int:
        """Return how many blocks can be allocated."""
        return len(self._empty) + len(self._unheld)

    @property
    def used(self) -> int:
        """Return how many blocks are held."""
        return self.num_blocks - self.available

    def allocate(self, number: int) -> list[int]:
        """Return `number` blocks for one holder; there must be as many available."""
        assert number <= self.available, (number, self.available)
        blocks = []
        for _ in range(number):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._unheld.popitem(last=False)
                del self._block_of[self._hash_of.pop(block)]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known beginning of `hashes`, for one more holder."""
        blocks = []
        for each in hashes:
            block = self._block_of.get(each)
            if block is None:
                break
            self._references[block] += 1
            self._unheld.pop(block, None)
            blocks.append(block)
        return blocks

    def register(self, block: int, block_hash: bytes) -> None:
        """Let others share a full block from now on, unless they already share one with the same tokens."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash], self._hash_of[block] = block, block_hash

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one holder's blocks; of one sequence, the last block is the first to be given to others."""
        for block in reversed(blocks):
            assert self._references[block] > 0, block
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._hash_of:
                self._unheld[block] = None
            else:
                self._empty.append(block)

    def forget(self) -> None:
        """Share nothing of what was computed so far, as when weights have changed."""
        self._empty += self._unheld
        self._unheld.clear()
        self._hash_of.clear()
        self._block_of.clear()
