"""The paths of the data: on the command line or in a file, for all splits together or for each its own."""

import itertools
from argparse import Namespace

from megatron_deepseek.foreign_json import read_json

SPLITS = ("train", "valid", "test")

Path = tuple[str, ...]


def data_paths(args: Namespace) -> tuple[Path, tuple[Path | None, ...] | None]:
    """Return (path of all splits, None), or ((), paths of train, valid and test); entries are as in `--data-path`.

    With --mock-data the path is empty.

    Raise ValueError where none or several of the arguments for them are given, or a file cannot be read.
    """
    own = {name: getattr(args, f"{name}_data_path") for name in SPLITS}
    given = {"--mock-data": [] if args.mock_data else None, "--data-path": args.data_path,
             "--data-args-path": args.data_args_path, "--per-split-data-args-path": args.per_split_data_args_path,
             **{f"--{name}-data-path": path for name, path in own.items()}}
    named = [f"{option} {_short(value)}" for option, value in given.items() if value is not None]
    kinds = [args.mock_data or None, args.data_path, args.data_args_path, args.per_split_data_args_path,
             next(filter(None, own.values()), None)]
    if sum(kind is not None for kind in kinds) > 1:
        raise ValueError(f"{' and '.join(map(str.strip, named))} conflict: the data is given once")
    if args.mock_data:
        return (), None
    if args.data_path is not None:
        return tuple(args.data_path), None
    if args.data_args_path is not None:
        return _read_entries(args.data_args_path), None
    if args.per_split_data_args_path is not None:
        own = _read_splits(args.per_split_data_args_path)
    if own["train"] is None:
        missing = f" beside {' and '.join(named)}: --train-data-path" if named else \
            ": --data-path, --mock-data, --data-args-path, --train-data-path or --per-split-data-args-path"
        raise ValueError(f"the data for training is missing{missing}")
    return (), tuple(None if own[name] is None else tuple(own[name]) for name in SPLITS)


def data_arguments(args: Namespace) -> tuple[str, ...]:
    """Return how messages name what `data_paths` found for train, valid and test in a file; empty without a file."""
    if args.data_args_path is not None:
        return (f"--data-args-path {args.data_args_path}:",) * 3
    if args.per_split_data_args_path is not None:
        return tuple(f"--per-split-data-args-path {args.per_split_data_args_path}, {name}:" for name in SPLITS)
    return ()


def _short(value) -> str:
    entries = [value] if not isinstance(value, list) else value
    return " ".join(map(str, entries[:4])) + (" ..." if len(entries) > 4 else "")


def _read_entries(path) -> Path:
    """Read Megatron-LM's file of entries that blanks or new lines divide.

    Here a # that begins an entry makes the rest of its line a comment, which Megatron-LM would take for prefixes.
    """
    option = "--data-args-path"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is no text: {error}") from error
    entries = [entry for line in lines
               for entry in itertools.takewhile(lambda entry: not entry.startswith("#"), line.split())]
    if not entries:
        raise ValueError(f"{option} {path} is empty: it holds what --data-path takes, divided by blanks or new lines")
    return tuple(entries)


def _read_splits(path) -> dict[str, Path | None]:
    """Read Megatron-LM's file {"train": [...], "valid": [...], "test": [...]} of lists or texts with blanks."""
    option = "--per-split-data-args-path"

    def error_that(why: str) -> ValueError:
        return ValueError(f'{option} {path} {why}; it holds {{"train": [WEIGHT, PREFIX, ...], "valid": [...], ...}}')

    try:
        given = read_json(path)
    except ValueError as error:
        raise error_that(str(error).removeprefix(f"{path} ")) from error
    if not isinstance(given, dict) or not set(given) <= set(SPLITS):
        raise error_that("has other keys than train, valid and test")
    own = dict.fromkeys(SPLITS)
    for name, value in given.items():
        entries = value.split() if isinstance(value, str) else value
        if entries is not None and not (isinstance(entries, list)
                                        and all(isinstance(entry, (str, int, float)) for entry in entries)):
            raise error_that(f"has {value!r} for {name}")
        own[name] = tuple(map(str, entries)) if entries else None
    return own
