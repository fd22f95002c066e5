"""What a checkpoint holds and which of its files are damaged, told to a user: as JSON, and as lines of text."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from megatron_deepseek.checkpoint.building import Advance
from megatron_deepseek.checkpoint.dcp.files import DcpDirectory
from megatron_deepseek.checkpoint.integrity import CHECKSUMS, Damage, read_checksums, verify_directory, verify_files
from megatron_deepseek.checkpoint.native import WEIGHTS, Checkpoint
from megatron_deepseek.model.architecture.parameters import BIAS

_SHOWN = 3


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything that `lines` shows, with the files of every tensor in full, as a dictionary for JSON."""
    stored = checkpoint.stored
    tensors = [{"name": name, "shape": list(stored.shapes[name]),
                "dtype": str(stored.dtypes[name]).removeprefix("torch."),
                "bytes": sum(item.region.numel * item.dtype.itemsize for item in stored.items[name]),
                "parts": len(stored.items[name]),
                "files": sorted({item.file for item in stored.items[name]})} for name in stored.shapes]
    files = {path.name: path.stat().st_size for path in sorted(checkpoint.directory.iterdir()) if path.is_file()}
    return {"directory": str(checkpoint.directory), "iteration": checkpoint.iteration,
            "state": checkpoint.state.to_json(), "architecture": checkpoint.config.to_hf_dict(),
            "parameters": _parameters(checkpoint),
            "active_parameters": checkpoint.config.num_active_parameters(),
            "layout": checkpoint.layout, "optimizer": checkpoint.has_optimizer,
            "checksums": (checkpoint.directory / CHECKSUMS).exists(),
            "bytes": sum(files.values()), "files": files, "tensors": tensors}


def _parameters(checkpoint: Checkpoint) -> int:
    """Count the numbers of all weights, MTP modules included, routers' biases left out."""
    return sum(prod(shape) for name, shape in checkpoint.stored.shapes.items()
               if name.startswith(WEIGHTS) and not name.endswith(BIAS))


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a summary of `found` (from `describe`), then a row for each tensor."""
    architecture, state = found["architecture"], found["state"]
    yield found["directory"]
    yield (f"  {architecture['model_type']}, {found['parameters']:,} parameters, "
           f"{found['active_parameters']:,} active for a token: "
           f"{architecture['num_hidden_layers']} layers, hidden size {architecture['hidden_size']}, "
           f"{architecture.get('n_routed_experts') or 0} routed experts, "
           f"{architecture.get('num_nextn_predict_layers') or 0} MTP modules")
    yield "  " + ", ".join(f"{name} {value}" for name, value in state.items()
                          if name != "late" and not isinstance(value, (dict, list)))
    if state.get("late"):
        yield f"  {len(state['late'])} parameters were frozen at first, {_some([name for name, _ in state['late']])}"
    yield f"  written by {_layout(found['layout'])}"
    data = [name for name in found["files"] if name.endswith(".distcp")]
    yield (f"  {len(data)} data files, {found['bytes']:,} bytes in all, "
           f"optimizer state {'included' if found['optimizer'] else 'not included'}, "
           f"{'with' if found['checksums'] else 'without'} checksums")
    yield ""
    rows = [("tensor", "shape", "dtype", "bytes", "files")]
    rows += [(each["name"], "x".join(map(str, each["shape"])) or "scalar", each["dtype"], f"{each['bytes']:,}",
              _some(each["files"])) for each in found["tensors"]]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, shape, dtype, size, files in rows:
        yield f"{name:{widths[0]}}  {shape:>{widths[1]}}  {dtype:{widths[2]}}  {size:>{widths[3]}}  {files}"


def _layout(layout: dict[str, Any] | None) -> str:
    return "an unknown layout" if layout is None else ", ".join(f"{name} {value}" for name, value in layout.items())


def bytes_to_verify(directory: Path) -> int:
    """Return how many bytes `verify` reads; raise ValueError for a checkpoint without checksums."""
    listing = read_checksums(directory)
    if listing is None:
        raise ValueError(f"{directory} has no {CHECKSUMS}: it was written before there were any, and nothing can be "
                         f"said about its bytes")
    return sum(entry.bytes for entry in listing.values())


def verify(directory: Path, workers: int, advance: Advance) -> list[str]:
    """Return a line for each damaged file of a checkpoint that has checksums, with the tensors that it holds."""
    damage = verify_directory(directory, workers, advance)
    assert damage is not None, "bytes_to_verify comes first"
    return _damage_lines(directory, damage)


def checksum_checks(directory: Path) -> list[Callable[[Advance], None]]:
    """Return `DirectoryBuild.checks`, one for each file that has a checksum.

    Each raises ValueError if its file has changed since the checksum was taken.
    """
    listing = read_checksums(directory) or {}

    def check(name: str, advance: Advance) -> None:
        damage = verify_files(directory, listing, [name], 1, advance)
        if damage:
            raise ValueError(f"{directory}/{_damage_lines(directory, damage)[0]}")

    return [partial(check, name) for name in sorted(listing)]


def _damage_lines(directory: Path, damage: Sequence[Damage]) -> list[str]:
    """Return a line for each damaged file that names the tensors in it, unless .metadata is damaged too."""
    try:
        items = DcpDirectory(directory).items
    except ValueError:
        items = {}
    holds: dict[str, list[str]] = {}
    for name in items:
        for file in {item.file for item in items[name]}:
            holds.setdefault(file, []).append(name)
    return [f"{each}; it holds {_some(holds[each.file])}" if each.file in holds else str(each) for each in damage]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
