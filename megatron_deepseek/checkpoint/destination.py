"""Where a checkpoint may be made: not in a directory that is a model already, least of all in its own source.

Files of two kinds in one directory are worse than an error: `--load` of it takes one of the two models.
"""

from pathlib import Path

from megatron_deepseek.checkpoint.dcp.metadata import METADATA
from megatron_deepseek.checkpoint.tracker import TRACKER, is_huggingface, iteration_directory, iterations


def new_iteration(save: Path, iteration: int) -> Path:
    """The directory to make under --save, which holds no other checkpoint. ValueError where it does.

    One that an earlier start of the same command has finished is no other: `produce` knows.
    """
    if is_huggingface(save):
        raise ValueError(f"--save {save} is a Hugging Face model, whose directory takes no checkpoint beside it")
    stay_outside(save)
    destination = iteration_directory(save, iteration)
    if (save / TRACKER).exists() or any(iteration_directory(save, each) != destination for each in iterations(save)):
        raise ValueError(f"--save {save} holds a checkpoint already")
    return destination


def stay_outside(save: Path) -> None:
    """ValueError if --save is, or lies in, one iteration of a checkpoint."""
    inside = next((path for path in (save, *save.absolute().parents) if (path / METADATA).is_file()), None)
    if inside is not None:
        raise ValueError(f"--save {save} lies in a checkpoint, {inside}, which must stay as its checksums are")
