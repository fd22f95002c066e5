"""run.json in --save: how each start of a run was made, so that it can be made again.

Written by rank 0 when a start has been checked and its data is open, before the first step; all starts are kept, the
last one last. tools/rerun.py prints the command of one.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.runtime.metrics import replace_content
from megatron_deepseek.settings import Settings

FILE = "run.json"
_PACKAGES = ("megatron-deepseek", "torch", "numpy", "megatron-core", "tokenizers", "transformer-engine")
# Variables of the environment that change what a run does, or how fast; others are nobody's business.
_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS")
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "PYTORCH_")
_OF_TORCHRUN = ("TORCH_NCCL_ASYNC_ERROR_HANDLING",)  # which it sets for its ranks
_MOST_DIGESTED = 1 << 30  # bytes of an .idx file
_REPOSITORY = Path(__file__).resolve().parents[2]


def describe_start(settings: Settings, device: str, iteration: int, files: Mapping[str, Any],
                   environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the record of this start, on rank 0, from the `iteration` that it goes on from.

    `device` is the name of what a rank computes on, `files` has sizes or digests of data and tokenizer by path.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "iteration": iteration,
        "command": [*launcher(environ), *sys.argv], "directory": os.getcwd(),
        "environment": {name: value for name, value in sorted(environ.items())
                        if name in _VARIABLES or (name.startswith(_PREFIXES) and name not in _OF_TORCHRUN)},
        "commit": commit(), "versions": {"python": platform.python_version(), **_versions()},
        "host": platform.node(), "device": device, "world_size": int(environ.get("WORLD_SIZE", "1")),
        "restart": int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")), "layout": asdict(settings.layout),
        "files": {name: _with_digest(name, value) for name, value in files.items()}}


def launcher(environ: Mapping[str, str] = os.environ, parent: Path | None = None) -> list[str]:
    """Return the words of the command before the entry: those of the agent that started this process, or Python.

    Linux tells the agent's command line (`parent`); elsewhere an equal torchrun is put together from the environment.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return [sys.executable]
    parent = parent or Path(f"/proc/{os.getppid()}/cmdline")
    try:
        words = parent.read_bytes().decode().rstrip("\0").split("\0")
        return words[:len(words) - len(sys.argv)] if words[-len(sys.argv):] == sys.argv else _torchrun(environ)
    except (OSError, UnicodeDecodeError):
        return _torchrun(environ)


def _torchrun(environ: Mapping[str, str]) -> list[str]:
    nodes = environ.get("GROUP_WORLD_SIZE", "1")
    several = ["--nnodes", nodes, "--node_rank", environ.get("GROUP_RANK", "0"), "--master_addr",
               environ.get("MASTER_ADDR", ""), "--master_port", environ.get("MASTER_PORT", "")] if nodes != "1" else []
    return ["torchrun", *several, "--nproc_per_node", environ.get("LOCAL_WORLD_SIZE", "1")]


def commit() -> str | None:
    """Return the commit of this source, "+" behind it where files have changed; None where there is no repository."""
    try:
        answers = [subprocess.run(["git", "-C", str(_REPOSITORY), *words], capture_output=True, text=True, timeout=10,
                                  check=True).stdout.strip()
                   for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])]
    except (OSError, subprocess.SubprocessError):
        return None
    return answers[0] + ("+" if answers[1] else "")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _with_digest(name: str, value: Any) -> Any:
    """Return the XXH3 digest of an .idx file, which changes where its .bin has other documents; else `value`."""
    path = Path(name)
    if path.suffix != ".idx" or not isinstance(value, int) or value > _MOST_DIGESTED:
        return value
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def add_start(save: Path, start: Mapping[str, Any]) -> None:
    """Add a start to run.json, which is replaced at once. Raise OSError if it cannot be, ValueError if damaged."""
    path = save / FILE
    starts = read_starts(path) if path.exists() else []
    replace_content(path, (json.dumps({"starts": [*starts, start]}, indent=1) + "\n").encode())


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Return the starts in a run.json, the last one last. Raise ValueError if the file is missing or damaged."""
    starts = read_object(path).fields.get("starts")
    if not isinstance(starts, list) or not all(
            isinstance(start, dict) and isinstance(start.get("command"), list) and start["command"]
            and all(isinstance(word, str) for word in start["command"]) for start in starts):
        raise ValueError(f"{path} is no record of starts with their commands")
    return starts
