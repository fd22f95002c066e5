"""Tensors moved between random shardings, number by number, with the bytes that travel and the memory that it takes."""

import random
from itertools import product
from math import prod

import pytest
import torch
import torch.distributed as dist
from kept_memory import Watch

from megatron_deepseek.parallel.regions import Region
from megatron_deepseek.parallel.resharding import Part, Resharding

RANKS, CPU = 4, torch.device("cpu")
Sharding = list[list[Region]]  # the regions of each rank


def cuts_of(size: int, draw: random.Random) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(draw.randrange(size) for _ in range(draw.randrange(3)))})
    return list(zip(edges, edges[1:]))


def drawn(shape: tuple[int, ...], draw: random.Random, all_held: bool) -> Sharding:
    """A grid of regions, each on some ranks; on one at least if `all_held`."""
    ranks: Sharding = [[] for _ in range(RANKS)]
    for bounds in product(*(cuts_of(size, draw) for size in shape)):
        region = Region(tuple(low for low, _ in bounds), tuple(high - low for low, high in bounds))
        for rank in draw.sample(range(RANKS), draw.randint(1 if all_held else 0, RANKS)):
            ranks[rank].append(region)
    return ranks


def whole_of(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers of which no two of all tensors are alike, and which every dtype here has."""
    return number * 1000 + torch.arange(prod(shape), dtype=torch.float64).view(shape)


def part(whole: torch.Tensor, region: Region) -> torch.Tensor:
    return whole[tuple(slice(place, place + size) for place, size in zip(region.place, region.shape))]


def strided(numbers: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory that has others between them."""
    return torch.stack([numbers, -numbers], -1)[..., 0]


def move_drawn(seed: int, round_bytes: int) -> None:
    """Move tensors twice, with other numbers the second time; assert here what must be."""
    draw, rank = random.Random(seed), dist.get_rank()
    shapes = {f"{number}": tuple(draw.randint(1, 9) for _ in range(draw.randrange(4))) for number in range(8)}
    wholes = {name: whole_of(int(name), shape) for name, shape in shapes.items()}
    dtypes = {name: draw.choice((torch.float64, torch.float32)) for name in shapes}
    held = {name: drawn(shape, draw, all_held=True) for name, shape in shapes.items()}
    wanted = {name: drawn(shape, draw, all_held=False) for name, shape in shapes.items() if name != "7"}
    sources = {name: [Part(region, strided(part(wholes[name], region))) for region in of_ranks[rank]]
               for name, of_ranks in held.items()}
    targets = {name: [Part(region, strided(torch.zeros(region.shape, dtype=dtypes[name]))) for region in of_ranks[rank]]
               for name, of_ranks in wanted.items()}
    resharding = Resharding(sources, targets, CPU, round_bytes)
    for sign in (1, -1):
        for parts in sources.values():
            for each in parts:
                each.local.abs_().mul_(sign)
        resharding.move(sources, targets)
        for name, parts in targets.items():
            for each in parts:
                assert torch.equal(each.local, sign * part(wholes[name], each.region).to(dtypes[name])), (name, each)
    assert resharding.received_bytes == sum(
        dtypes[name].itemsize for name, parts in targets.items() for each in parts
        for index in product(*(range(low, high) for low, high in zip(each.region.place, each.region.end)))
        if not any(region.overlap(Region(index, (1,) * len(index))) for region in held[name][rank]))


def move_many(seeds: list[int], sizes: list[int]) -> None:
    for seed, round_bytes in zip(seeds, sizes):
        move_drawn(seed, round_bytes)


def test_numbers_arrive_whatever_the_shardings(ranks):
    """With rounds of a few numbers, of hundreds, and one that has all."""
    ranks.run(RANKS, move_many, [*range(24)], [64, 1000, 2**20] * 8)


def move_in_rounds(round_bytes: int) -> tuple[list[tuple[int, int]], int]:
    """A matrix that rank 0 has all of, and all ranks want, beside small ones, most of which fit into a round together.
    Returns what rank 0 sends and receives in each round, and the largest memory that a rank takes for it.
    """
    rank, large = dist.get_rank(), Region((0, 0), (64, 32))
    sources = {"large": [Part(large, torch.rand(64, 32))] if rank == 0 else []}
    sources |= {f"small {number}": [Part(Region((rank * 2,), (2,)), torch.rand(2))] for number in range(8)}
    targets = {"large": [Part(large, torch.empty(64, 32))]}
    targets |= {name: [Part(Region((0,), (2 * RANKS,)), torch.empty(2 * RANKS))] for name in sources if name != "large"}
    resharding = Resharding(sources, targets, CPU, round_bytes)
    with Watch() as watch:
        resharding.move(sources, targets)
    return [(each.sent_bytes, each.received_bytes) for each in resharding.rounds], max(
        size for _, size in watch.made.values() if size < targets["large"][0].local.nbytes)


def test_rounds_are_as_large_as_was_asked_for(ranks):
    """Rank 0 sends 3 x 8,192 bytes of the matrix: 8 columns each by 64 rows in a round of 6,144 bytes, so 4 of these.
    """
    found = ranks.run(RANKS, move_in_rounds, 6144)
    assert found[0][0][:4] == [(6144, 0)] * 4 and sum(sent for sent, _ in found[0][0]) == 4 * 6144 + 8 * 3 * 8
    assert len(found[0][0]) == 5
    assert max(largest for _, largest in found) == 6144


def sent_by_two(copies: list[list[int]]) -> list[int]:
    """How many bytes this rank sends of eight tensors that ranks 0 and 1 hold, for each group of ranks that want them.
    """
    rank, region, sent = dist.get_rank(), Region((0,), (4,)), []
    sources = {f"{number}": [Part(region, torch.rand(4))] if rank < 2 else [] for number in range(8)}
    for wanting in copies:
        targets = {name: [Part(region, torch.empty(4))] if rank in wanting else [] for name in sources}
        sent.append(sum(each.sent_bytes for each in Resharding(sources, targets, CPU).rounds))
    return sent


def test_those_who_hold_the_same_share_the_work(ranks):
    found = ranks.run(RANKS, sent_by_two, [[2, 3], [3], [0, 1], [1, 2]])
    assert found == [[128, 64, 0, 64], [128, 64, 0, 64], [0] * 4, [0] * 4]


def want_more_than_there_is() -> str:
    sources = {"a": [Part(Region((dist.get_rank(),), (1,)), torch.ones(1))]}
    targets = {"a": [Part(Region((0,), (4,)), torch.ones(4))]}
    with pytest.raises(ValueError) as error:
        Resharding(sources, targets, CPU)
    return str(error.value)


def test_what_nobody_holds_is_refused(ranks):
    assert ranks.run(2, want_more_than_there_is)[1] == "a is wanted on rank 1, and 2 of its numbers are on no rank"
