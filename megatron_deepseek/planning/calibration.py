"""Rescale a plan by a run: --calibrate takes a --save directory, its metrics.jsonl, or a profile of a rank.

metrics.jsonl gives the whole step, so computing and travelling are scaled alike. A profile (runtime/profile.py) gives
both by themselves where it has a GPU's kernels: those of NCCL are what travels, and its waits for other ranks with it.
What ran is in arguments.json of the run's last checkpoint; without one it is taken to be what is planned. It must be
the planned model but for the numbers of its layers and words, so a few layers on a few GPUs can stand for all of it.
"""

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from megatron_deepseek.foreign_json import LARGEST_LIST, parse_json, read_object
from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.stage_time import Scales
from megatron_deepseek.planning.step_time import StepTime, step_time

METRICS, ARGUMENTS, PROFILES = "metrics.jsonl", "arguments.json", "profile"
MAY_DIFFER = ("num_hidden_layers", "num_nextn_predict_layers", "first_k_dense_replace", "vocab_size")
_PARTS = {"layout": None, "pipeline": None, "batch": None, "recompute": None, "offload": None, "communication": None,
          "run": ("bf16", "fp8_format", "sharding"), "data": ("seq_length", "reset_attention_mask"),
          "loss": ("moe_router_force_load_balancing", "loss_chunk_size")}
_WARM_UP = 0.2  # of a run's steps, which are left out at its start
_TRAVELS = re.compile(r"nccl|all_?to_?all|deep_?ep", re.IGNORECASE)


@dataclass(frozen=True)
class Measured:
    """Seconds of a step: whole, or computing and travelling on one rank. `tokens` of a step where they are known."""

    whole: float | None = None
    computing: float | None = None
    travelling: float | None = None
    tokens: int | None = None
    rank: int = 0


def calibrated(job: Job, gpu: Gpu, run: Path, planned: bool = True) -> tuple[Scales, str]:
    """Return the scales of `run`, and a line on what they are from. Raise ValueError for a run that says nothing of
    `job`'s model, or of what ran unless that can be what is `planned`.
    """
    found = measured(run)
    recorded = _recorded(run)
    if recorded is None and not planned:
        raise ValueError(f"--calibrate {run} has no checkpoint whose {ARGUMENTS} says what ran")
    ran = job if recorded is None else _job_of(job, recorded, run)
    if found.tokens is not None and found.tokens != ran.settings.batch.global_batch_size * ran.settings.data.seq_length:
        raise ValueError(f"--calibrate {run}: its steps have {found.tokens} tokens, "
                         f"{'what is planned' if recorded is None else ARGUMENTS} has "
                         f"{ran.settings.batch.global_batch_size} x {ran.settings.data.seq_length}")
    scales = _scales(found, step_time(ran, gpu), str(run))
    words = ", taken to be what is planned" if recorded is None else ""
    return scales, (f"calibrated by {run} ({ran.layout.world_size} ranks{words}): computing x {scales.computing:.3g}, "
                    f"travelling x {scales.travelling:.3g}")


def measured(run: Path) -> Measured:
    """Return what a run's files say of its steps."""
    if run.is_dir():
        profiles = sorted(run.glob(f"{PROFILES}/rank_*.json*"))
        if (run / METRICS).exists():
            return _from_metrics(run / METRICS)
        if not profiles:
            raise ValueError(f"--calibrate {run} has neither {METRICS} nor {PROFILES}/rank_*.json.gz")
        run = profiles[0]
    elif not run.exists():
        raise ValueError(f"--calibrate {run} does not exist")
    return _from_metrics(run) if run.suffix == ".jsonl" else _from_profile(run)


def _from_metrics(path: Path) -> Measured:
    steps = [each for each in _records(path) if "step_seconds" in each and not each.get("skipped")]
    numbers = [each["step_seconds"] for each in steps[int(_WARM_UP * len(steps)):]]
    if not numbers or not all(isinstance(each, (int, float)) and each > 0 for each in numbers):
        raise ValueError(f"--calibrate {path} has no steps with step_seconds")
    tokens = steps[-1].get("tokens")
    return Measured(whole=median(numbers), tokens=tokens if isinstance(tokens, int) else None)


def _records(path: Path) -> Iterator[dict]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        record = parse_json(line, f"{path}, line {number}") if line.strip() else {}
        if isinstance(record, dict):
            yield record


def _from_profile(path: Path) -> Measured:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            events = json.loads(file.read()).get("traceEvents")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--calibrate {path} is no profile: {error}") from error
    if not isinstance(events, list):
        raise ValueError(f"--calibrate {path} is no profile: it has no traceEvents")
    whole = [each for each in events if isinstance(each, dict) and each.get("ph") == "X"]
    steps = {each["name"]: each["dur"] / 1e6 for each in whole if str(each.get("name")).startswith("ProfilerStep#")}
    rank = re.search(r"rank_(\d+)", path.name)
    kernels = [each for each in whole if each.get("cat") == "kernel"]
    if not steps:
        raise ValueError(f"--calibrate {path} has no steps (ProfilerStep#)")
    if not kernels:
        return Measured(whole=median(steps.values()), rank=int(rank[1]) if rank else 0)
    travels = sum(each["dur"] for each in kernels if _TRAVELS.search(each["name"])) / 1e6
    computes = sum(each["dur"] for each in kernels) / 1e6 - travels
    return Measured(computing=computes / len(steps), travelling=travels / len(steps), rank=int(rank[1]) if rank else 0)


def _recorded(run: Path) -> Mapping[str, Any] | None:
    """Return the settings of the last checkpoint beside `run`, None if there is none."""
    folders = [run, run.parent, run.parent.parent] if not run.is_dir() else [run]
    for folder in folders:
        found = sorted(folder.glob(f"iter_*/{ARGUMENTS}")) or sorted(folder.glob(ARGUMENTS))
        if found:
            fields = read_object(found[-1], LARGEST_LIST).object("settings")
            return {name: fields.object(name).fields for name in fields.fields}
    return None


def _job_of(job: Job, recorded: Mapping[str, Any], run: Path) -> Job:
    """Return the job that ran."""
    ours, theirs = json.loads(json.dumps(asdict(job.model))), dict(recorded.get("model", {}))
    for name, value in ours.items():
        if name not in MAY_DIFFER and theirs.get(name, value) != value:
            raise ValueError(f"--calibrate {run} is of another model: {name} is {theirs[name]} there and {value} here")
    model = replace(job.model, **{name: theirs[name] for name in MAY_DIFFER if name in theirs})
    parts = {part: _filled(getattr(job.settings, part), recorded.get(part, {}), names)
             for part, names in _PARTS.items()}
    return Job(replace(job.settings, model=model, **parts))


def _filled(part: Any, values: Mapping[str, Any], names: tuple[str, ...] | None) -> Any:
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
             if name in part.__dataclass_fields__ and (names is None or name in names)}
    return replace(part, **known)


def _scales(found: Measured, planned: StepTime, source: str) -> Scales:
    if found.whole is not None:
        ratio = found.whole / planned.step_seconds
        return Scales(ratio, ratio, source)
    each = planned.job.layout.world_size // planned.job.layout.pp
    computing, travelling = planned.busy(min(found.rank // each, planned.job.layout.pp - 1))
    known = travelling and found.travelling
    return Scales(found.computing / computing, found.travelling / travelling if known else 1.0, source)
