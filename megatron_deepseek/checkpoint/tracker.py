"""The tracker file and the directories beside it: which checkpoint is the last finished one, which never were.

    SAVE/iter_0000100/              whole: it got this name by one rename
         iter_0000100.saving/       being written, or torn by a kill; never loaded
         iter_0000100.replaced/     the older one of that iteration, for the moment between two renames
         iter_0000100.removing/     being removed (--keep-last)
         latest_checkpointed_iteration.txt

This module only looks; publishing.py makes the changes.
"""

import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
SAVING, REPLACED, REMOVING = ".saving", ".replaced", ".removing"
_ITERATION = re.compile(r"iter_(\d+)")
_DIRECTORY = re.compile(r"iter_(\d{7,})(\.saving|\.replaced|\.removing)?")


def iteration_directory(root: Path, iteration: int) -> Path:
    """Return the path of a checkpoint, whether it exists or not."""
    return root / f"iter_{iteration:07d}"


def next_tracker(root: Path) -> Path:
    """Return the file of the tracker's next content, written before the directory that it names gets its name."""
    return root / f"{TRACKER}.tmp"


def is_huggingface(path: Path) -> bool:
    """Return whether a directory looks like a Hugging Face model, by its files' names."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def find_iteration(root: Path, iteration: int) -> Path | None:
    """Return the directory of the finished checkpoint of `iteration`, None if there is none."""
    directory = iteration_directory(root, iteration)
    older = directory.with_name(directory.name + REPLACED)
    return next((path for path in (directory, older) if path.is_dir()), None)


def last_iteration(root: Path) -> int | None:
    """Return the iteration of the last finished checkpoint under `root`, None if there is none.

    None also if the tracker is not a number or names a directory that is not there. If there is no tracker, its next
    content counts: a run was killed between the renames of its first checkpoint and of its tracker.
    """
    tracker = root / TRACKER
    try:
        iteration = int((tracker if tracker.exists() else next_tracker(root)).read_text())
    except (OSError, ValueError):
        return None
    return iteration if find_iteration(root, iteration) is not None else None


def iterations(root: Path) -> list[int]:
    """List the iterations of finished checkpoints under `root`, oldest first, whatever the tracker says."""
    found = {int(match[1]) for match, _ in _entries(root) if match[2] in (None, REPLACED)}
    return sorted(iteration for iteration in found if find_iteration(root, iteration) is not None)


def leftovers(root: Path) -> list[Path]:
    """List the directories that a killed run left: torn checkpoints, and those that it was removing."""
    return sorted(path for match, path in _entries(root)
                  if match[2] in (SAVING, REMOVING) or (match[2] == REPLACED and (root / path.stem).is_dir()))


def _entries(root: Path) -> list[tuple[re.Match, Path]]:
    if not root.is_dir():
        return []
    matches = ((_DIRECTORY.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return [(match, path) for match, path in matches if match]


def begins_anew(root: Path) -> bool:
    """Return whether nothing under `root` was ever finished, so that a run may start there from nothing."""
    return not (root / TRACKER).exists() and not iterations(root)


def problem(root: Path, step: int | None = None) -> str | None:
    """Return why no checkpoint of `root` can be loaded, and what to do; None if one can.

    With `step`, that of iteration `step` is meant. Only names are looked at.
    """
    if step is None and (is_huggingface(root) or last_iteration(root) is not None):
        return None
    if step is not None and find_iteration(root, step) is not None:
        return None
    if not root.is_dir():
        return "there is no such directory"
    if step is None and (one := _ITERATION.fullmatch(root.name)) and (root / "config.json").is_file():
        return f"it is one checkpoint of {root.parent}; give that directory, with --ckpt-step {int(one[1])}"
    there = iterations(root)
    listing = f"it has iteration{'s' * (len(there) > 1)} {', '.join(map(str, there))}" if there else ""
    if step is not None:
        return f"it has no finished checkpoint of iteration {step}" + (f"; {listing}" if there else "")
    wrong = _tracker_problem(root / TRACKER)
    if not there and (root / "config.json").is_file():
        return "it has a config.json, but neither *.safetensors nor a finished checkpoint"
    if not there:
        return f"it holds no finished checkpoint: {wrong}"
    return f"{wrong}; {listing}: --ckpt-step {there[-1]} loads one, and the next save sets the file right"


def _tracker_problem(tracker: Path) -> str:
    try:
        text = tracker.read_text(errors="replace").strip()
    except FileNotFoundError:
        return f"{TRACKER} is missing"
    except OSError as error:
        return f"{TRACKER} cannot be read ({error.strerror})"
    if text.isdecimal():
        return f"{TRACKER} names iteration {int(text)}, which is not there"
    return f"{TRACKER} is damaged: {text[:40]!r} is not a number"


def leftover_notes(root: Path) -> list[str]:
    """Return a line for each directory that a killed run left behind, printed at the next start."""
    reasons = {SAVING: "a save that was never finished", REMOVING: "half removed", REPLACED: "replaced by a newer save"}
    return [f"{path} is {reasons[path.suffix]}: not loaded, removed at the next save" for path in leftovers(root)]
