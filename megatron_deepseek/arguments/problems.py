"""All that is wrong with a command line, in one error."""

from collections.abc import Iterable


class Problems(ValueError):
    """A user's mistakes, one sentence each; as text they stand in one line."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("; ".join(self.problems))


def problems_of(error: ValueError) -> tuple[str, ...]:
    """Return the sentences of an error, a single one of any other ValueError."""
    return error.problems if isinstance(error, Problems) else (str(error),)
