"""What a run needs and a plan or a dry run of it does not: a length and data. Without torch."""

from collections.abc import Sequence

_LENGTH = ("--train-iters", "--train-samples", "--epochs")
_DATA = ("--data-path", "--mock-data", "--data-args-path", "--train-data-path", "--per-split-data-args-path",
         "--dataset")
_LONG = "1000000"  # iterations of a run whose length is not given: it plays no part in its memory


def completed(argv: Sequence[str], data: str = "--data-path") -> list[str]:
    """Return `argv` with a length and, as `data`, a name of data that nobody reads, where they are not given."""
    given = {word.split("=")[0] for word in argv}
    words = list(argv)
    if not given & {*_LENGTH}:
        words += ["--train-iters", _LONG]
    if not given & {*_DATA}:
        words += [data, "any"]
    return words
