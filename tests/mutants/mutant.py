"""What a row of the tables is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in megatron_deepseek/`file`, and `new` in its place must make one of `tests` fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def of(file: str, tests: tuple[str, ...], *changes: tuple[str, str]) -> tuple[Mutant, ...]:
    return tuple(Mutant(file, old, new, tests) for old, new in changes)
