"""Covering arrays: few cases in which every valid pair of option values meets (Cohen et al. 1997, AETG).

A space is options with their values and the constraints among them. A pair is valid if some case that meets every
constraint has it; that is decided by search, not by sampling, so no valid pair is missed.
"""

import hashlib
import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


class Space:
    """`options`: name -> values. `constraints`: predicates whose parameters are named as the options they relate."""

    def __init__(self, options: Mapping[str, tuple], constraints: tuple[Callable[..., bool], ...]):
        self.options = options
        self._constraints = [(tuple(inspect.signature(each).parameters), each) for each in constraints]
        self._relating = {name: [] for name in options}
        for names, predicate in self._constraints:
            for name in names:
                self._relating[name].append((set(names), names, predicate))

    def fingerprint(self) -> str:
        """Return a digest of the options and of what each constraint says of every combination of its options."""
        digest = hashlib.blake2b(repr(dict(self.options)).encode(), digest_size=16)
        for names, predicate in self._constraints:
            allowed = [bool(predicate(*values)) for values in product(*(self.options[name] for name in names))]
            digest.update(repr((names, allowed)).encode())
        return digest.hexdigest()

    def allows(self, case: Case, name: str) -> bool:
        """Whether the partial `case` meets every constraint on `name` whose other options are known too."""
        return all(predicate(*[case[n] for n in names]) for needed, names, predicate in self._relating[name]
                   if case.keys() >= needed)

    def complete(self, fixed: Case, random_: random.Random) -> Case | None:
        """A random valid case with the values of `fixed`, or None if there is none."""
        if not all(self.allows(fixed, name) for name in fixed):
            return None
        names = [name for name in self.options if name not in fixed]
        return self._extend(dict(fixed), names, random_)

    def _extend(self, case: Case, names: list[str], random_: random.Random) -> Case | None:
        if not names:
            return {name: case[name] for name in self.options}
        name, *rest = names
        for value in random_.sample(self.options[name], len(self.options[name])):
            case[name] = value
            if self.allows(case, name) and (found := self._extend(case, rest, random_)):
                return found
        del case[name]
        return None

    def pairs(self) -> Iterator[Pair]:
        """All pairs of values of different options, valid or not."""
        for one, other in combinations(self.options, 2):
            yield from (((one, a), (other, b)) for a in self.options[one] for b in self.options[other])


def pairs_of(case: Case) -> set[Pair]:
    return set(combinations(case.items(), 2))


def covering_array(space: Space, seed: int, cost: Callable[[Case], float], candidates: int = 8) -> list[Case]:
    """Cases that cover every valid pair, found greedily: each new one is the best of some random ones that hold an
    uncovered pair, the best being that with the most uncovered pairs for its cost.
    """
    random_ = random.Random(seed)
    uncovered = dict.fromkeys(space.pairs())
    array = []
    while uncovered:
        pair = next(iter(uncovered))
        drawn = [space.complete(dict(pair), random_) for _ in range(candidates)]
        if drawn[0] is None:
            del uncovered[pair]
            continue
        best = max(drawn, key=lambda case: sum(pair in uncovered for pair in pairs_of(case)) / cost(case))
        array.append(best)
        for covered in pairs_of(best):
            uncovered.pop(covered, None)
    return array


def cheaper_array(space: Space, array: list[Case], seed: int, cost: Callable[[Case], float], rounds: int = 2000,
                  candidates: int = 10) -> list[Case]:
    """Cases that cover every pair of `array` for less. Each round frees one case of all values but those whose pairs no
    other case has; it goes if there are none, else the cheapest of some random cases with them takes its place. One as
    cheap is taken too, so that over the rounds pairs gather in fewer cases.
    """
    random_, array = random.Random(seed), list(array)
    holders = Counter(pair for case in array for pair in pairs_of(case))
    for _ in range(rounds):
        index = random_.randrange(len(array))
        holders.subtract(pairs_of(array[index]))
        needed = {option for pair in pairs_of(array[index]) if not holders[pair] for option in pair}
        if not needed:
            del array[index]
            continue
        drawn = [space.complete(dict(needed), random_) for _ in range(candidates)]
        array[index] = min(*drawn, array[index], key=cost)
        holders.update(pairs_of(array[index]))
    return array
