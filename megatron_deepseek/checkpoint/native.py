"""A native checkpoint (one that training writes), opened by tools and tests without a job of ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepseek.checkpoint.dcp.files import METADATA, DcpDirectory, open_dcp
from megatron_deepseek.checkpoint.tracker import (
    REMOVING,
    SAVING,
    find_iteration,
    is_huggingface,
    last_iteration,
    problem,
)
from megatron_deepseek.checkpoint.train_state import STATE, TrainState, read_state
from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage, to_string

CONFIG, LAYOUT, ARGUMENTS = "config.json", "layout.json", "arguments.json"
WEIGHTS, OPTIMIZER = "model.", "optimizer."


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One iteration on disk: its architecture, training state and stored tensors.

    `layout` is layout.json, the layout of the job that wrote it, None if there is no such file.
    """

    directory: Path
    config: ModelConfig
    state: TrainState
    layout: dict[str, Any] | None
    stored: DcpDirectory

    @property
    def iteration(self) -> int:
        return self.state.iteration

    @property
    def has_optimizer(self) -> bool:
        return any(name.startswith(OPTIMIZER) for name in self.stored.shapes)

    def inputs(self) -> list[Path]:
        """Return every file that is read to get the tensors and the state."""
        names = {item.file for items in self.stored.items.values() for item in items}
        return [self.directory / name for name in (CONFIG, STATE, METADATA, *sorted(names))]


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """Return one iteration's directory: `path` itself, or among the checkpoints under it that of `step` or the last.

    Raise ValueError if there is none, saying why.
    """
    if path.suffix in (SAVING, REMOVING):
        raise ValueError(f"{path} is a save that was never finished")
    if step is None and ((path / METADATA).exists() or path.name.startswith("iter_")):
        return path
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    wrong = problem(path, step)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong}")
    if step is None and is_huggingface(path):
        raise ValueError(f"{path} is a Hugging Face directory: tools/convert_checkpoint.py makes a checkpoint of it")
    return find_iteration(path, last_iteration(path) if step is None else step)


def open_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """Open a checkpoint; raise ValueError, naming the file, if something is missing, truncated or damaged."""
    directory = find_checkpoint(path, step)
    state = read_state(directory)
    layout = _read_layout(directory / LAYOUT) if (directory / LAYOUT).exists() else None
    if not (directory / CONFIG).is_file():
        raise ValueError(f"{directory / CONFIG} is missing")
    return Checkpoint(directory, ModelConfig.from_file(directory / CONFIG), state, layout, open_dcp(directory))


def layout_note(layout: Layout, stages: tuple[Stage, ...], schedule: str, seq_length: int) -> dict[str, Any]:
    """Return the content of layout.json: a job's layout, named as its arguments are."""
    sizes = {"world_size": layout.world_size, "data_parallel_size": layout.dp,
             "tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
             "context_parallel_size": layout.cp, "expert_model_parallel_size": layout.ep,
             "expert_tensor_parallel_size": layout.etp, "seq_length": seq_length}
    return sizes | ({"pipeline_model_parallel_layout": to_string(stages), "pipeline_schedule": schedule}
                    if layout.pp > 1 else {})


def _read_layout(path: Path) -> dict[str, Any]:
    """Read layout.json; only seq_length is checked, for resharding uses it. The rest is shown to people."""
    found = read_object(path)
    found.integer("seq_length", 1, default=None)
    return dict(found.fields)
