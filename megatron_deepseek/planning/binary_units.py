"""The binary unit that sizes are shown in: GiB, and where they are all smaller MiB or KiB."""

from typing import NamedTuple


class Unit(NamedTuple):
    """A binary unit's name and its bytes."""

    name: str
    bytes: int


_UNITS = (Unit("GiB", 2**30), Unit("MiB", 2**20), Unit("KiB", 2**10))


def unit_for(largest: float) -> Unit:
    """Return the greatest unit of which `largest` bytes are at least one, KiB where they are less than that."""
    return next((unit for unit in _UNITS if largest >= unit.bytes), _UNITS[-1])


def with_unit(size: float) -> str:
    """Return `size` bytes in their own unit, with one decimal."""
    unit = unit_for(size)
    return f"{size / unit.bytes:.1f} {unit.name}"
