"""GPUs and their networks as data: gpus.json has those that are known, with its sources; a user's file adds others.

    {"gpus": {"mine": {"like": "h100", "memory_gb": 96}}}

`like` takes what is not said from a known GPU; without it all of Gpu's fields must be there.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.near_names import near_names

KNOWN = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True)
class Gpu:
    """One GPU (or one Ascend package) and its links, in one direction. FLOPS are dense, in 10^12 a second.

    `memory_gb` is what the driver shows, in 10^9 bytes. `scale_up_gb_s` joins the `scale_up_gpus` of a node or rack,
    `network_gb_s` goes beyond them, `host_gb_s` to the host's memory. `reached_*` are the parts of these peaks that
    published runs reached; None, as for `fp8_tflops`, where the GPU has no FP8.
    """

    name: str
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gb: float
    memory_tb_s: float
    scale_up_gb_s: float
    scale_up_gpus: int
    network_gb_s: float
    host_gb_s: float
    reached_bf16: float
    reached_fp8: float | None
    reached_scale_up: float
    reached_network: float
    sources: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Return the bytes of memory that the driver shows."""
        return int(self.memory_gb * 1e9)


_NUMBERS = tuple(field.name for field in fields(Gpu) if field.name not in ("name", "sources"))
_MAY_BE_NONE = ("fp8_tflops", "reached_fp8")


def load_gpus(extra: Path | None = None) -> dict[str, Gpu]:
    """Return the known GPUs by name, and those of the file `extra`, which may replace known ones.

    Raise ValueError, naming file, GPU and field, for what is missing, unknown or no positive number.
    """
    known = {name: _gpu(name, row, KNOWN) for name, row in json.loads(KNOWN.read_text())["gpus"].items()}
    if extra is None:
        return known
    rows = dict(read_object(extra).fields).get("gpus")
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f'{extra} has no object "gpus" with a GPU in it')
    for name, row in rows.items():
        known[name.lower()] = _gpu(name.lower(), _filled(row, known, name, extra), extra)
    return known


def find_gpu(name: str, extra: Path | None = None) -> Gpu:
    """Return the GPU `name`. Raise ValueError, with the names that may be meant, for one that is not known."""
    gpus = load_gpus(extra)
    if name.lower() in gpus:
        return gpus[name.lower()]
    near = near_names(name.lower(), gpus, 0.5)
    raise ValueError(f"--gpu {name!r} is not known; " + (f"did you mean {' or '.join(near)}? " if near else "")
                     + f"There are {', '.join(gpus)}; --gpu-file adds others")


def _filled(row: object, known: dict[str, Gpu], name: str, path: Path) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{path}: GPU {name!r} is {row!r}, not an object")
    like = row.get("like")
    if like is None:
        return row
    if str(like).lower() not in known:
        raise ValueError(f"{path}: GPU {name!r} is like {like!r}, which is not one of {', '.join(known)}")
    base = known[str(like).lower()]
    return {field: getattr(base, field) for field in (*_NUMBERS, "sources")} | {
        key: value for key, value in row.items() if key != "like"}


def _gpu(name: str, row: dict, path: Path) -> Gpu:
    missing = [field for field in _NUMBERS if field not in row]
    unknown = [key for key in row if key not in (*_NUMBERS, "sources")]
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which is unknown"
        raise ValueError(f"{path}: GPU {name!r} {problem}")
    for field in _NUMBERS:
        value = row[field]
        if value is None and field in _MAY_BE_NONE:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{path}: GPU {name!r} has {field} {value!r}, which is no positive number")
    return Gpu(name=name, **{field: row[field] for field in _NUMBERS}, sources=tuple(row.get("sources", ())))
