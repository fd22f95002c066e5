"""tools/reshard_checkpoint.py as a user runs it: killed, under a limit of memory below the checkpoint, resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_deepseek.checkpoint.convert.names import native_places
from megatron_deepseek.checkpoint.integrity import checksum_directory
from megatron_deepseek.cli.reshard_checkpoint import main
from megatron_deepseek.model.architecture.config import ModelConfig

REPOSITORY = Path(__file__).parents[2]
TOOL = str(REPOSITORY / "tools" / "reshard_checkpoint.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
MODEL = ModelConfig(
    vocab_size=64, hidden_size=1024, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, moe_intermediate_size=1024, n_routed_experts=24,
    n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, topk_method="greedy", scoring_func="softmax",
    max_position_embeddings=64)
EXPERTS = ("--expert-model-parallel-size", "2", "--data-parallel-size", "4")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Some 310 MB of weights in one file; beyond the experts there is next to nothing."""
    root = tmp_path_factory.mktemp("large") / "run"
    directory = root / "iter_0000005"
    directory.mkdir(parents=True)
    shapes = {place.whole: place.whole_shape for place in native_places(MODEL)}
    state = {f"model.{name}": torch.empty(shape).uniform_() for name, shape in shapes.items()}
    dcp.save(state, checkpoint_id=directory, no_dist=True)
    (directory / "config.json").write_text(json.dumps(MODEL.to_hf_dict()))
    (directory / "state.json").write_text('{"iteration": 5, "consumed_samples": 80, "optimizer_steps": 5}')
    checksum_directory(directory)
    (root / "latest_checkpointed_iteration.txt").write_text("5\n")
    return root


def address_space() -> int:
    """Kilobytes that importing the command takes."""
    code = ("import megatron_deepseek.cli.reshard_checkpoint_run; "
            "print([l for l in open('/proc/self/status') if l.startswith('VmPeak')][0].split()[1])")
    return int(subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_kill_and_resume_in_little_memory(tmp_path, large):
    """SIGKILL in the middle; the same command keeps the finished files. Both runs have less memory than one file."""
    size = sum(path.stat().st_size for path in large.rglob("*.distcp")) // 1024
    limit = f"export MALLOC_ARENA_MAX=1; ulimit -v {address_space() + int(0.7 * size)}; exec {sys.executable} \"$@\""
    arguments = ["reshard", "--load", str(large), "--save", str(tmp_path / "out"), *EXPERTS]
    slow = "import os, time; pwrite = os.pwrite; os.pwrite = lambda *a: (time.sleep(0.004), pwrite(*a))[1]; "
    run = (f"import sys, runpy; {slow}sys.argv = {[TOOL, *arguments]!r}; "
           "runpy.run_path(sys.argv[0], run_name='__main__')")
    process = subprocess.Popen(["bash", "-c", limit, "limited", "-c", run], env=ENVIRONMENT, stderr=subprocess.PIPE)
    work, deadline = tmp_path / "out" / "iter_0000005.incomplete", time.monotonic() + 120
    while not list((work / "finished").glob("*.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [work.name]
    kept = {path.name: path.stat().st_ino for path in (work / "output").glob("*.distcp")
            if (work / "finished" / f"{path.name}.json").exists()}
    done = subprocess.run(["bash", "-c", limit, "limited", TOOL, *arguments], env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=240)
    assert done.returncode == 0 and "continuing the resharding" in done.stderr, done.stderr
    assert kept and not work.exists()
    for name, inode in kept.items():
        assert (tmp_path / "out" / "iter_0000005" / name).stat().st_ino == inode
    assert main(["verify", str(tmp_path / "out")], {}) == 0
    assert main(["diff", str(large), str(tmp_path / "out")], {}) == 0
