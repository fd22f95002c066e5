"""Which checkpoint of a directory is the last finished one: a file that is written last says so."""

from pathlib import Path

MARKER = "latest_checkpointed_iteration.txt"


def iteration_directory(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def is_huggingface(path: Path) -> bool:
    """Whether a directory looks like a Hugging Face model, by its files' names."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def last_iteration(root: Path) -> int | None:
    """The iteration of the last finished checkpoint under `root`, or None.

    None also where the marker is not a number or names a directory that is not there.
    """
    try:
        iteration = int((root / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return iteration if iteration_directory(root, iteration).is_dir() else None
