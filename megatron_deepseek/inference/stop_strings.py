"""Finds stop strings in a growing text, however many there are, in a step for each character.

It is the automaton of Aho and Corasick (doi 10.1145/360825.360855). Its state is the longest end of the text that
begins a stop string, so its depth is also how many characters must be held back: they may become part of one.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


class StopStrings:
    """The automaton of some strings, none of them empty. Nodes are numbers; node 0 is the empty text."""

    def __init__(self, strings: Iterable[str]):
        self._next: list[dict[str, int]] = [{}]
        self._fall: list[int] = [0]
        self._depth: list[int] = [0]
        self._found: list[int] = [0]  # length of the longest string that ends here, 0 for none
        for each in strings:
            self._add(each)
        self._link()

    def _add(self, string: str) -> None:
        node = 0
        for character in string:
            following = self._next[node].get(character)
            if following is None:
                following = self._next[node][character] = len(self._next)
                self._next.append({})
                self._fall.append(0)
                self._depth.append(self._depth[node] + 1)
                self._found.append(0)
            node = following
        self._found[node] = len(string)

    def _link(self) -> None:
        """Set where each node falls back to: the longest proper end of its text that is a node too."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            self._found[node] = self._found[node] or self._found[self._fall[node]]
            for character, following in self._next[node].items():
                self._fall[following] = self.step(self._fall[node], character)
                queue.append(following)

    def step(self, node: int, character: str) -> int:
        """Return the node after one more character."""
        while node and character not in self._next[node]:
            node = self._fall[node]
        return self._next[node].get(character, 0)

    def found(self, node: int) -> int:
        """Return the length of the longest stop string that ends at this node, 0 for none."""
        return self._found[node]

    def held(self, node: int) -> int:
        """Return how many of the last characters may be the beginning of a stop string."""
        return self._depth[node]


@dataclass
class StopSearch:
    """The place in the automaton of one text."""

    strings: StopStrings
    node: int = 0

    def feed(self, text: str, may_stop: bool = True) -> tuple[int, int] | None:
        """Read on; return where the first stop string ends in `text`, and its length, or None if none ends in it.

        Unless it `may_stop`, all of the text is read, whatever ends in it.
        """
        for place, character in enumerate(text):
            self.node = self.strings.step(self.node, character)
            if may_stop and self.strings.found(self.node):
                return place + 1, self.strings.found(self.node)
        return None

    @property
    def held(self) -> int:
        return self.strings.held(self.node)
