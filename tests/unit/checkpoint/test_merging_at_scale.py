"""Merging a base of several files: how much memory it takes, and what a real SIGKILL in the middle leaves behind."""

import multiprocessing
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_checkpoints import V3_WIDE, write_hf
from test_adapter_merging import write

from megatron_deepseek.checkpoint.adapter import merging
from megatron_deepseek.checkpoint.convert.names import hf_shapes
from megatron_deepseek.cli import merge_lora_run  # noqa: F401 (so that what it imports does not count as the merge's)
from megatron_deepseek.cli.merge_lora import main

# 110 million numbers: 220 MB in bfloat16, in files of 52 MB and more.
CONFIG = replace(V3_WIDE, hidden_size=1024, intermediate_size=8192, moe_intermediate_size=1024, n_routed_experts=8,
                 num_hidden_layers=4, vocab_size=2048, num_nextn_predict_layers=0)
RANK, SHARDS, MIB = 8, 4, 1 << 20
FORK = multiprocessing.get_context("fork")


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random ones that repeat, since these are many."""
    few = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    size = torch.Size(shape).numel()
    return few.repeat(-(-size // len(few)))[:size].view(shape)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    weights = {name: numbers(shape, torch.float32 if name.endswith("bias") else torch.bfloat16)
               for name, shape in hf_shapes(CONFIG).items()}
    return write_hf(tmp_path_factory.mktemp("scale") / "base", weights, CONFIG.to_hf_dict(), SHARDS)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    """Two, of every matrix of the layers."""
    layers = {name.removesuffix(".weight"): shape for name, shape in hf_shapes(CONFIG).items()
              if len(shape) == 2 and "embed" not in name and "lm_head" not in name and ".gate.weight" not in name}
    found = {}
    for layer, (rows, columns) in layers.items():
        found[f"base_model.model.{layer}.lora_A.weight"] = numbers((RANK, columns), torch.float32)
        found[f"base_model.model.{layer}.lora_B.weight"] = numbers((rows, RANK), torch.float32)
    root = tmp_path_factory.mktemp("scale")
    return [write(root / name, found, r=RANK) for name in ("one", "two")]


def words(base: Path, adapters: list[Path], save: Path, *more: str) -> list[str]:
    chosen = ["0.5", str(adapters[0]), "-1", str(adapters[1])]
    return ["--base", str(base), "--adapter", *chosen, "--save", str(save), *more]


def in_a_process(function) -> int:
    """The exit status of a child that does it."""
    process = FORK.Process(target=function)
    process.start()
    process.join()
    return process.exitcode


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("most, more", [(60 * MIB, ()), (110 * MIB, ("--dtype", "fp8"))], ids=["bf16", "fp8"])
def test_memory_is_that_of_blocks_of_rows(base, adapters, tmp_path, most, more):
    """Whatever the base's size: about 40 MB was seen, and for blocks of 128 rows of FP8 65 to 95 MB; a file in float32
    would be more.
    """
    def measured():
        before = resident()
        assert main(words(base, adapters, tmp_path / "out", "--max-shard-size", "32MB", *more)) == 0
        (tmp_path / "grown").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))

    assert in_a_process(measured) == 0
    files = sorted(path.stat().st_size for path in base.glob("*.safetensors"))
    assert len(files) == SHARDS and files[0] > 40 * MIB
    assert int((tmp_path / "grown").read_text()) < most


def test_after_a_sigkill_it_goes_on_and_writes_the_same_bytes(base, adapters, tmp_path):
    """Killed while it reads a block in the middle of the third file; the first two are kept as they are."""
    def killed():
        read, count = merging.MergedSource.read, []
        third = sorted((path for path in (tmp_path / "whole").glob("*.safetensors")), key=lambda path: path.name)[2]

        def reads(self, *where):
            count.append(where)
            if (unfinished / f"{third.name}.tmp").exists() and len(count) > 1:
                if (unfinished / f"{third.name}.tmp").stat().st_size > MIB:
                    os.kill(os.getpid(), signal.SIGKILL)
            return read(self, *where)

        merging.MergedSource.read = reads
        main(words(base, adapters, tmp_path / "out", "--max-shard-size", "16MB"))

    unfinished = tmp_path / "out.incomplete" / "output"
    assert main(words(base, adapters, tmp_path / "whole", "--max-shard-size", "16MB")) == 0
    assert in_a_process(killed) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_ino for path in unfinished.glob("*.safetensors")}
    assert len(kept) == 2 and len(list(unfinished.glob("*.tmp"))) == 1
    assert main(words(base, adapters, tmp_path / "out", "--max-shard-size", "16MB")) == 0
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept
    whole = {path.name: path for path in (tmp_path / "whole").iterdir()}
    assert len(whole) > 6 and {path.name for path in (tmp_path / "out").iterdir()} == whole.keys()
    for name, path in whole.items():
        assert (tmp_path / "out" / name).read_bytes() == path.read_bytes(), name
    assert not (tmp_path / "out.incomplete").exists()
