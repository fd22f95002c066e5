"""What an option of Megatron-LM is answered here, as data: groups of options that have one answer for one reason."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ANY, SOME = "*", "+"  # argparse's nargs: any number of values, at least one


@dataclass(frozen=True)
class Group:
    """Options with one answer. `reason` is a phrase or a sentence for the user.

    `names` are divided by blanks. A name alone takes no value, "--a=" one value, "--a=+" one or more, "--a=*" any
    number. In groups that are refused "--a=x|y" takes one value, and asks for nothing where that is x or y, which
    Megatron-LM does anyway.
    """

    reason: str
    names: str

    def options(self) -> "Iterable[Option]":
        for word in self.names.split():
            name, equals, rest = word.partition("=")
            values = "" if not equals else rest if rest in (ANY, SOME) else "1"
            yield Option(name, self.reason, values, tuple(rest.split("|")) if rest not in ("", ANY, SOME) else ())


@dataclass(frozen=True)
class Option:
    """An option that this project does not have. `values`: "", "1", "+" or "*", how many it takes.

    `harmless`: values that ask for nothing.
    """

    name: str
    reason: str
    values: str
    harmless: tuple[str, ...] = ()

    def miscounted(self, given: Sequence[str]) -> str | None:
        """Return what is wrong with the number of values `given`, None if nothing is."""
        right = {"": len(given) == 0, "1": len(given) == 1, SOME: len(given) > 0, ANY: True}[self.values]
        if right:
            return None
        wanted = {"": "no value", "1": "one value", SOME: "values"}[self.values]
        return f"{self.name} takes {wanted}, not {' '.join(given) or 'none'}"

    def asks_for_nothing(self, given: Sequence[str]) -> bool:
        return len(given) == 1 and any(same_value(given[0], value) for value in self.harmless)


def same_value(one: str, other: str) -> bool:
    """Return whether two texts are the same value: as numbers where both are numbers."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one.lower() == other.lower()


def by_name(*tables: Sequence[Group]) -> dict[str, Option]:
    """Return the options of all groups by name."""
    return {option.name: option for table in tables for group in table for option in group.options()}
