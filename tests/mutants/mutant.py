"""What a row of the tables is."""

from dataclasses import dataclass
from functools import cached_property

from definitions import PACKAGE, Definition, find


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in the function, method, class or constant called `name`, and `new` in its place must make one
    of `tests` fail.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]

    @cached_property
    def place(self) -> Definition:
        """Return where `name` is defined. Raise ValueError unless exactly one definition has that name."""
        return find(self.name)

    @property
    def problem(self) -> str | None:
        """Return why the mistake cannot be planted, None if it can."""
        try:
            place = self.place
        except ValueError as error:
            return str(error)
        if missing := [test for test in self.tests if not (PACKAGE.parent / test.partition("::")[0]).exists()]:
            return f"{self.name}: there is no {', '.join(missing)}"
        found = (PACKAGE / place.file).read_text()[place.start:place.end].count(self.old)
        return None if found == 1 else f"stands {found} times in {self.name} of {place.file}: {self.old!r}"

    def planted_in(self, text: str) -> str:
        """Return `text`, which is that of the definition's file, with the mistake in it."""
        start, end = self.place.start, self.place.end
        return text[:start] + text[start:end].replace(self.old, self.new) + text[end:]


def of(tests: tuple[str, ...], *changes: tuple[str, str, str]) -> tuple[Mutant, ...]:
    """Return a mutant for each (name, old, new); one of `tests` must fail with each."""
    return tuple(Mutant(name, old, new, tests) for name, old, new in changes)
