"""Where a checkpoint may be made: not in a directory that is a model already, least of all in its own source.

If one directory held the files of two models, `--load` of it would silently take one of them. So that is an error.
"""

from pathlib import Path

from megatron_deepseek.checkpoint.dcp.metadata import METADATA
from megatron_deepseek.checkpoint.tracker import TRACKER, is_huggingface, iteration_directory, iterations


def new_iteration(save: Path, iteration: int) -> Path:
    """Return the directory to make under --save for `iteration`; raise ValueError if --save holds another checkpoint.

    The same iteration may be there already: an earlier start of this command may have finished it, which
    `build_directory` finds out.
    """
    if is_huggingface(save):
        raise ValueError(f"--save {save} is a Hugging Face model, whose directory takes no checkpoint beside it")
    stay_outside(save)
    destination = iteration_directory(save, iteration)
    if (save / TRACKER).exists() or any(iteration_directory(save, each) != destination for each in iterations(save)):
        raise ValueError(f"--save {save} holds a checkpoint already")
    return destination


def stay_outside(save: Path) -> None:
    """Raise ValueError if --save is, or lies in, the directory of one iteration."""
    inside = next((path for path in (save, *save.absolute().parents) if (path / METADATA).is_file()), None)
    if inside is not None:
        raise ValueError(f"--save {save} lies in a checkpoint, {inside}, which must stay as its checksums are")
