"""A checkpoint's checksums against its files, by all ranks of a job together."""

from pathlib import Path

import torch.distributed as dist

from megatron_deepseek.checkpoint.integrity import Checksum, Damage, read_checksums, verify_files


def verify(directory: Path) -> list[Damage] | None:
    """Return on every rank all damage of a checkpoint's files, None for a directory without checksums.

    Every byte is read once, by one of the ranks. Rank 0 reads checksums.json and sends it to the others: if each rank
    read it, they could see different listings, and wait for each other.
    """
    listing = _listing_of_first_rank(directory)
    if listing is None:
        return None
    ranks, rank = dist.get_world_size(), dist.get_rank()
    own = sorted(listing, key=lambda name: (listing[name].bytes, name))[rank::ranks]
    everyone: list = [None] * ranks
    dist.all_gather_object(everyone, verify_files(directory, listing, own))
    return [damage for of_rank in everyone for damage in of_rank]


def _listing_of_first_rank(directory: Path) -> dict[str, Checksum] | None:
    """Return what rank 0 reads of checksums.json; raise ValueError on every rank if it is damaged."""
    found: list = [None]
    if dist.get_rank() == 0:
        try:
            found = [read_checksums(directory)]
        except ValueError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], ValueError):
        raise found[0]
    return found[0]
