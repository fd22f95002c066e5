"""Every file that a command opens, damaged in a few hundred ways: the command does its work or says one line.

Run as a module it goes on with other seeds: python tests/helpers/file_fuzz.py --cases 2000 --seed 7
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from legacy_megatron import Job, write_legacy
from native_checkpoints import tool
from small_checkpoints import V3_WIDE, convert, random_weights, v3_directory
from small_models import whole_stage
from pickle_damage import Bomb

from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.verification import verify
from megatron_deepseek.checkpoint.loadable import check_checkpoint, refuse_damage
from megatron_deepseek.cli import generate as generate_command
from megatron_deepseek.cli import plot
from megatron_deepseek.data.tokenizer import EOD
from megatron_deepseek.inference import loading
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.model.build import shape_stages
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.runtime.metrics import cut_after

SECONDS = 30.0  # of one command, on a machine with other things to do
GROWTH = 1 << 20  # KiB of memory over all cases
VALUES = ("null", "true", "-1", "0", "1.5", "2147483648", "1099511627776", "9223372036854775808", "-1e300", "1e999",
          "NaN", '""', '"x"', '"\\ud800"', '"a\\nb"', '"../../x"', "[]", "[1]", "[[]]", "{}", '{"a": 1}', "[" * 100_000,
          '{"a":' * 100_000, "1" * 5000)


def train(root: Path, config=V3_WIDE) -> int:
    """What a run does with --load before its first step."""
    directory = check_checkpoint(root, config)
    refuse_damage(directory, verify(directory) or [])
    (stage,) = shape_stages(config, [whole_stage(config)], _meshes(), 16)
    stage.to_empty(device="cpu")
    checkpoint.load(directory, [stage], None)
    return 0


def _meshes() -> Meshes:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return build_meshes(Layout(), torch.device("cpu"))


def say(root: Path, *more: str) -> int:
    _meshes()
    arguments = ["--load", str(root), "--prompt", "a", "--max-new-tokens", "1", *more]
    joined = patch.object(loading, "join_job", lambda *args, **kwargs: None)  # `_meshes` has joined it already
    with joined, patch.object(dist, "destroy_process_group", lambda: None):
        return generate_command.run(generate_command.parse_arguments(arguments))


def divide(root: Path) -> int:
    if dist.is_initialized():
        dist.destroy_process_group()  # parts of a layout are worked out outside of jobs
    return tool("reshard", "--load", root, "--dry-run", "--world-size", "2")


def draw(root: Path) -> int:
    curves = plot.read_curves(root / "metrics.jsonl", "a")
    cut_after(root / "metrics.jsonl", 1)
    return len(curves.iteration) * 0


READERS = {
    "hf": {"convert": lambda root, out: convert("hf", "native", root, out),
           "generate": lambda root, out: say(root), "train": lambda root, out: train(root)},
    "native": {"inspect": lambda root, out: tool("inspect", root), "verify": lambda root, out: tool("verify", root),
               "merge": lambda root, out: tool("merge", "--load", root, "--save", out, "--no-verify"),
               "reshard": lambda root, out: divide(root),
               "convert": lambda root, out: convert("native", "hf", root, out),
               "generate": lambda root, out: say(root), "train": lambda root, out: train(root),
               "plot": lambda root, out: draw(root)},
    "megatron": {"convert": lambda root, out: convert("megatron", "native", root, out)},
    "legacy": {"convert": lambda root, out: convert("megatron", "native", root, out)},
}


def make_sound(directory: Path) -> dict[str, Path]:
    """A model in each form, with everything beside it that is read. `bare` is the native one without checksums."""
    hf = v3_directory(directory / "hf")
    _write_tokenizer(hf / "tokenizer.json")
    (hf / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOD}, "add_bos_token": False}))
    for to in ("native", "megatron"):
        assert convert("hf", to, hf, directory / to) == 0
    iteration = directory / "native" / "iter_0000000"
    (iteration / "layout.json").write_text(json.dumps({"world_size": 1, "seq_length": 64}))
    listed = directory / "listed"
    assert tool("merge", "--load", directory / "native", "--save", listed, "--max-file-size", "600KB") == 0
    (iteration / "checksums.json").unlink()
    step = {"lm_loss": 1.5, "mtp_loss": [2.5], "learning_rate": 1e-3, "grad_norm": 1.0}
    for root in (directory / "native", listed):
        (root / "metrics.jsonl").write_text("".join(json.dumps({"iteration": n} | step) + "\n" for n in range(1, 4)))
    job = Job(((0,), (1, None)), tp=2, pp=2)
    legacy = write_legacy(directory / "legacy", V3_WIDE, random_weights(V3_WIDE, torch.bfloat16), job)
    shutil.copytree(directory / "megatron" / "huggingface", legacy / "huggingface")
    return {"hf": hf, "native": directory / "native", "listed": listed, "megatron": directory / "megatron",
            "legacy": legacy}


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([EOD])
    tokenizer.save(str(path))


def changes(file: Path, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Contents for `file` without end, each with what was done; None is to remove it."""
    sound = file.read_bytes()
    while True:
        kind, at = rng.randrange(12), rng.randrange(max(len(sound), 1))
        if kind == 0:
            yield "removed", None
        elif kind == 1:
            yield f"cut at {at}", sound[:at]
        elif kind == 2:
            yield "empty", b""
        elif kind == 3:
            yield f"grown at {at}", sound[:at] + rng.randbytes(9) + sound[at:]
        elif kind == 4:
            yield "a pickle", pickle.dumps(Bomb(file.parent / "exploded"), rng.choice((0, 2, 4)))
        elif kind == 5:
            yield "zeros", bytes(len(sound))
        elif kind in (6, 7) or file.suffix not in (".json", ".jsonl", ".safetensors"):
            near = rng.randrange(max(min(len(sound), 300), 1)) if rng.random() < 0.5 else at
            yield f"a bit at {near}", sound[:near] + bytes([sound[near] ^ 1 << rng.randrange(8)]) + sound[near + 1:]
        else:
            yield _other_json(file, sound, rng)


def _other_json(file: Path, sound: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A value of the JSON, which may be the header of a safetensors file or a line, replaced by one of VALUES."""
    if file.suffix == ".safetensors":
        length = int.from_bytes(sound[:8], "little")
        what, header = _replaced(sound[8:8 + length], rng)
        return what, len(header).to_bytes(8, "little") + header + sound[8 + length:]
    if file.suffix == ".jsonl":
        first, *others = sound.splitlines(keepends=True)
        what, line = _replaced(first, rng)
        return what, line + b"\n" + b"".join(others)
    return _replaced(sound, rng)


def _replaced(text: bytes, rng: random.Random) -> tuple[str, bytes]:
    found = json.loads(text)
    value, at = rng.choice(VALUES), []
    inner = holder = found
    while isinstance(inner, (dict, list)) and inner and (not at or rng.random() < 0.8):
        at.append(rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner))))
        holder, inner = inner, inner[at[-1]]
    if not at or rng.random() < 0.05:
        return f"{value[:20]} for everything", value.encode()
    kind = rng.randrange(8)
    if kind == 0:
        del holder[at[-1]]
        return f"without {at}", json.dumps(found).encode()
    if kind == 1 and isinstance(holder, dict):
        holder["another" if rng.random() < 0.5 else "hidden_sise"] = 1
        return f"a key more beside {at}", json.dumps(found).encode()
    holder[at[-1]] = "@@@"
    return f"{value[:20]} for {at}", json.dumps(found).encode().replace(b'"@@@"', value.encode())


def outcome(command: Callable[[Path, Path], int], root: Path, out: Path) -> str | None:
    """What is wrong with how a command ended, or None."""
    errors, begun = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            status = exit_status("fuzz", lambda: command(root, out))
        except BaseException:
            return traceback.format_exc()
    lines = [line for line in errors.getvalue().splitlines() if "error" in line.lower()]
    output.getvalue().encode()  # a terminal takes no half of a surrogate pair
    if status not in (0, 2) or (status == 2 and len(lines) != 1):
        return f"status {status}: {errors.getvalue()[-2000:]}"
    if any(len(line) > 2000 or not line.isprintable() for line in lines):
        return f"a line of {max(map(len, lines))} characters: {lines[0][:300]!r}"
    if time.monotonic() - begun > SECONDS:
        return f"{time.monotonic() - begun:.0f} s"
    return None


def run(cases: int, seed: int, directory: Path, only: str = "*") -> list[str]:
    """Failures of `cases` damaged files, each read by one command that reads such."""
    rng, failures = random.Random(seed), []
    sound = make_sound(directory / "sound")
    files = [(name, path.relative_to(root)) for name, root in sound.items() for path in sorted(root.rglob("*"))
             if path.is_file() and path.match(only)]
    made = {each: changes(sound[each[0]] / each[1], rng) for each in files}
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(cases):
        name, file = files[number % len(files)]
        what, content = next(made[name, file])
        readers = READERS[{"listed": "native"}.get(name, name)]
        reader = rng.choice(sorted(readers))
        root, out = directory / "copy", directory / "out"
        shutil.copytree(sound[name], root, copy_function=os.link)
        (root / file).unlink()
        if content is not None:
            (root / file).write_bytes(content)
        wrong = outcome(readers[reader], root, out)
        if wrong is None and list(directory.rglob("exploded")):
            wrong = "a pickle was run"
        if wrong is None and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held > GROWTH:
            wrong, held = "memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if wrong is not None:
            failures.append(f"case {number}, {reader} of {name}/{file}, {what}:\n{wrong}")
        for path in (root, out, directory / "out.incomplete"):
            shutil.rmtree(path, ignore_errors=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", default="*", help="names of the files to damage, as a pattern")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        failures = run(options.cases, options.seed, Path(directory), options.files)
    print("\n\n".join(failures))
    print(f"{len(failures)} of {options.cases} cases failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
