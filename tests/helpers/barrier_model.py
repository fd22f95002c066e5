"""mbarriers as the PTX ISA has them, and a search through every order in which the actors of a protocol can act.

An mbarrier's phase ends when all arrivals it was made for and all bytes it was told of have come; a wait for parity p
returns once the phase of that parity is over, so on a new barrier a wait for parity 1 returns at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Barrier:
    made_for: int
    pending: int
    copies: int = 0  # announced and not yet come; fewer than none where they came before they were announced
    phase: int = 0

    def settle(self) -> "Barrier":
        return replace(self, pending=self.made_for, phase=self.phase + 1) if not (self.pending or self.copies) else self

    def arrive(self, copies: int = 0) -> "Barrier":
        assert self.pending > 0, "more arrivals than a barrier was made for"
        return replace(self, pending=self.pending - 1, copies=self.copies + copies).settle()

    def arrived_copy(self) -> "Barrier":
        return replace(self, copies=self.copies - 1).settle()

    def over(self, parity: int) -> bool:
        return self.phase % 2 != parity


@dataclass(frozen=True)
class Actor:
    step: int = 0  # blocks of K done
    place: str = "wait"


def put(values: tuple, index: int, value) -> tuple:
    return values[:index] + (value,) + values[index + 1:]


def explore(start, following: Callable[..., Iterable], is_done: Callable[..., bool]) -> int:
    """Return how many states can be reached. Raise AssertionError where one is wrong, or a deadlock."""
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        after = list(following(state))
        assert after or is_done(state), "deadlock"
        new = {each for each in after if each not in seen}
        seen |= new
        todo += new
    return len(seen)
