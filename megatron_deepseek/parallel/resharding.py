"""Tensors from one sharding to another over the same ranks, in memory: no whole tensor on the way, and no file.

A rank says of every tensor, by name, which regions of the whole it holds and which it wants. All ranks learn that of
each other once, when a `Resharding` is made; moving the numbers may then be repeated, as after every step of training.

What a rank holds itself it copies. Of what others hold it receives each number once: where several ranks hold it, those
who want it are shared out among them. Senders convert to the dtype that is wanted. Numbers travel in rounds, each an
all-to-all of parts of tensors, in which no rank sends or receives more than a number of bytes that the caller chooses.

Nothing here knows what the tensors are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_deepseek.parallel.regions import Region

ROUND_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class Part:
    """A region of a tensor, and the memory on this rank that holds its numbers, which need not be contiguous."""

    region: Region
    local: torch.Tensor


Parts = Mapping[str, Sequence[Part]]  # what a rank has of tensors, by name; regions of one tensor do not overlap
Holders = dict[Region, list[int]]  # the regions of a tensor and the ranks that have each, in their order


@dataclass(frozen=True)
class Leg:
    """A region of the tensor `name` that travels between this rank and the rank `peer`."""

    name: str
    peer: int
    region: Region

    def cut(self, number: int, parts: int) -> "Leg | None":
        """Return part `number` of about equal `parts` along the longest dimension; None where there are fewer."""
        axis = max(range(len(self.region.shape)), key=self.region.shape.__getitem__, default=None)
        if axis is None:
            return None if number else self
        step = -(-self.region.shape[axis] // parts)
        low, high = number * step, min((number + 1) * step, self.region.shape[axis])
        if low >= high:
            return None
        place, shape = [*self.region.place], [*self.region.shape]
        place[axis], shape[axis] = place[axis] + low, high - low
        return Leg(self.name, self.peer, Region(tuple(place), tuple(shape)))


Legs = tuple[list[Leg], list[Leg]]  # what a rank sends, and what it receives


@dataclass(eq=False)
class Round:
    """What this rank sends and receives in one all-to-all: all of one dtype, in the order of ranks, names, regions."""

    dtype: torch.dtype
    sends: list[Leg] = field(default_factory=list)
    receives: list[Leg] = field(default_factory=list)

    def add(self, sends: Sequence[Leg], receives: Sequence[Leg]) -> None:
        self.sends = sorted([*self.sends, *sends], key=_order)
        self.receives = sorted([*self.receives, *receives], key=_order)

    @property
    def sent_bytes(self) -> int:
        return _numbers(self.sends) * self.dtype.itemsize

    @property
    def received_bytes(self) -> int:
        return _numbers(self.receives) * self.dtype.itemsize


class Resharding:
    """The way from `sources` to `targets`; every rank of `group` makes one, with what it has of both.

    Of the parts only regions and dtypes are looked at, so memory may be on the meta device. `device`: where rounds are
    put together. `round_bytes`: the most that a rank sends, and the most that it receives, in a round; regions are cut
    for that along their longest dimension, and no finer than that goes.

    Raise ValueError for a tensor that some rank wants and not all of which is held.
    """

    def __init__(self, sources: Parts, targets: Parts, device: torch.device, round_bytes: int = ROUND_BYTES,
                 group: dist.ProcessGroup | None = None):
        self.device, self.round_bytes, self.group = device, round_bytes, group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        held, wanted, self.dtypes = self._tell(sources, targets)
        names = sorted(wanted, key=lambda name: (str(self.dtypes[name]), name))
        legs = {name: _Way(name, number, held.get(name, {}), wanted[name]).legs(self.rank)
                for number, name in enumerate(names)}
        self.own = [leg for own, _, _ in legs.values() for leg in own]
        self.rounds = self._divide({name: (sends, receives) for name, (_, sends, receives) in legs.items()})

    @torch.no_grad()
    def move(self, sources: Parts, targets: Parts) -> None:
        """Fill the memory of `targets` with the numbers of `sources`. Every rank of the group calls it."""
        for leg in self.own:
            _memory(targets, leg).copy_(_memory(sources, leg))
        for each in self.rounds:
            received = self._exchange(each, [_memory(sources, leg) for leg in each.sends])
            for leg, numbers in zip(each.receives, received.split([leg.region.numel for leg in each.receives])):
                _memory(targets, leg).copy_(numbers.view(leg.region.shape))

    @property
    def received_bytes(self) -> int:
        """Return how many bytes come to this rank from others in a move."""
        return sum(each.received_bytes for each in self.rounds)

    def _tell(self, sources: Parts, targets: Parts
              ) -> tuple[dict[str, Holders], dict[str, Holders], dict[str, torch.dtype]]:
        """Return who holds and who wants which regions of every tensor, and the dtype in which it is wanted."""
        own = {name: [part.region for part in parts if part.region.numel] for name, parts in sources.items()}, {
            name: (parts[0].local.dtype, [part.region for part in parts if part.region.numel])
            for name, parts in targets.items() if parts}
        told: list = [None] * self.size
        dist.all_gather_object(told, own, group=self.group)
        held: dict[str, Holders] = {}
        wanted: dict[str, Holders] = {}
        dtypes: dict[str, torch.dtype] = {}
        for rank, (of_sources, of_targets) in enumerate(told):
            for name, (dtype, regions) in of_targets.items():
                assert dtypes.setdefault(name, dtype) == dtype, (name, dtypes[name], dtype)
                _note(wanted, name, regions, rank)
            for name, regions in of_sources.items():
                _note(held, name, regions, rank)
        return held, wanted, dtypes

    def _divide(self, legs: Mapping[str, Legs]) -> list[Round]:
        """Return the rounds, of which all ranks have equally many, with parts of the same tensors."""
        parts, costs = self._parts(legs)
        rounds: list[Round] = []
        used = 0
        for name, both in legs.items():
            for number in range(parts[name] if costs[name] else 0):
                if not rounds or rounds[-1].dtype != self.dtypes[name] or used + costs[name] > self.round_bytes:
                    rounds.append(Round(self.dtypes[name]))
                    used = 0
                used += costs[name]
                rounds[-1].add(*(_cut(each, number, parts[name]) for each in both))
        return rounds

    def _parts(self, legs: Mapping[str, Legs]) -> tuple[dict[str, int], dict[str, int]]:
        """Return in how many parts each tensor travels, and the most bytes that a rank sends or receives of a part."""
        longest = self._maxima([max((max(leg.region.shape, default=1) for each in both for leg in each), default=1)
                                for both in legs.values()])
        parts = dict.fromkeys(legs, 1)
        while True:
            costs = dict(zip(legs, self._maxima([self._cost(name, both, parts[name]) for name, both in legs.items()])))
            large = {name: most for name, most in zip(legs, longest)
                     if costs[name] > self.round_bytes and parts[name] < most}
            if not large:
                return parts, costs
            for name, most in large.items():
                parts[name] = min(most, -(-costs[name] // self.round_bytes) * parts[name])

    def _cost(self, name: str, both: Legs, parts: int) -> int:
        """Return the bytes that this rank sends or receives at most of one of `parts`: the first, none is larger."""
        return max(_numbers(_cut(each, 0, parts)) for each in both) * self.dtypes[name].itemsize

    def _maxima(self, numbers: Sequence[int]) -> list[int]:
        """Return the greatest of each number over the ranks."""
        greatest = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=self.group)
        return greatest.tolist()

    def _exchange(self, each: Round, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Send `numbers`, those of a round's legs; return all that is received, as one row of numbers."""
        sent = torch.empty(_numbers(each.sends), dtype=each.dtype, device=self.device)
        for into, part in zip(sent.split([part.numel() for part in numbers]), numbers):
            into.view(part.shape).copy_(part)
        received = torch.empty(_numbers(each.receives), dtype=each.dtype, device=self.device)
        sizes = [[size * each.dtype.itemsize for size in _sizes(legs, self.size)]
                 for legs in (each.receives, each.sends)]
        dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8), *sizes, group=self.group)
        return received


@dataclass(frozen=True, eq=False)
class _Way:
    """How one tensor, the one of this number, comes from those who hold its regions to those who want some.

    Regions that are held do not overlap. Equal ones are held by several ranks: the first of those who want some of it
    gets it of one, the second of the next. With which one that begins differs between tensors.
    """

    name: str
    number: int
    held: Holders
    wanted: Holders

    def legs(self, rank: int) -> tuple[list[Leg], list[Leg], list[Leg]]:
        """Return what `rank` copies of its own, what it sends and what it receives.

        Raise ValueError if not all that it wants is held by any.
        """
        own, sends, receives = [], [], []
        missing = sum(region.numel for region, takers in self.wanted.items() if rank in takers)
        for holders, takers, shared in self._shared(rank):
            givers = {taker: holders[(self.number + place) % len(holders)]
                      for place, taker in enumerate(_without(takers, holders))}
            missing -= shared.numel if rank in takers else 0
            own += [Leg(self.name, rank, shared)] if rank in holders and rank in takers else []
            sends += [Leg(self.name, taker, shared) for taker, giver in givers.items() if giver == rank]
            receives += [Leg(self.name, givers[rank], shared)] if rank in givers else []
        if missing:
            raise ValueError(f"{self.name} is wanted on rank {rank}, and {missing} of its numbers are on no rank")
        return own, sends, receives

    def _shared(self, rank: int) -> Iterator[tuple[list[int], list[int], Region]]:
        """Yield who holds and who wants a region, of all that `rank` has to do with."""
        for source, holders in self.held.items():
            for target, takers in self.wanted.items():
                if rank in holders or rank in takers:
                    shared = source.overlap(target)
                    if shared is not None:
                        yield holders, takers, shared


def _without(ranks: Sequence[int], others: Sequence[int]) -> list[int]:
    left_out = set(others)
    return [rank for rank in ranks if rank not in left_out]


def _note(noted: dict[str, Holders], name: str, regions: Sequence[Region], rank: int) -> None:
    for region in regions:
        noted.setdefault(name, {}).setdefault(region, []).append(rank)


def _cut(legs: Sequence[Leg], number: int, parts: int) -> list[Leg]:
    return [cut for leg in legs if (cut := leg.cut(number, parts)) is not None]


def _order(leg: Leg) -> tuple[int, str, Region]:
    return leg.peer, leg.name, leg.region


def _numbers(legs: Sequence[Leg]) -> int:
    return sum(leg.region.numel for leg in legs)


def _sizes(legs: Sequence[Leg], ranks: int) -> list[int]:
    """Return how many numbers each rank is sent, or sends."""
    sizes = [0] * ranks
    for leg in legs:
        sizes[leg.peer] += leg.region.numel
    return sizes


def _memory(parts: Parts, leg: Leg) -> torch.Tensor:
    """Return the memory of a leg's region, which lies in one of `parts`."""
    part = next(part for part in parts[leg.name] if part.region.overlap(leg.region) == leg.region)
    return part.local[part.region.slices(leg.region)]
