#!/usr/bin/env python3
"""Bytes per second of saving, loading and resharding a checkpoint beside `cp -r`, and what a background save stalls.

Ranks of one job hold a model with experts, its weights and two moments in float32, and do what training does: save,
which puts every file on the disk (fsync) before it is published; verify and load; save in the background, where
training stands still for the copy in memory. In turn with each, `cp -r` of the checkpoint, and `cp -r` followed by
fsync of the copies, which is what a save promises. The first round warms up memory and page cache and is not counted;
--rounds are. Then the last checkpoint is resharded, in the same way (reshard.py).
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from reshard import measure_rounds  # noqa: E402

from megatron_deepseek.checkpoint.job import distributed as checkpoint  # noqa: E402
from megatron_deepseek.checkpoint.job.verification import verify  # noqa: E402
from megatron_deepseek.checkpoint.job.state import state_to_save  # noqa: E402
from megatron_deepseek.checkpoint.tracker import iteration_directory  # noqa: E402
from megatron_deepseek.checkpoint.train_state import TrainState  # noqa: E402
from megatron_deepseek.model.architecture.config import ModelConfig  # noqa: E402
from megatron_deepseek.parallel.layout import Layout  # noqa: E402
from megatron_deepseek.parallel.mesh import build_meshes  # noqa: E402
from megatron_deepseek.parallel.start import keep_freed_memory  # noqa: E402
from megatron_deepseek.planning.pipeline_balance import resolve  # noqa: E402
from megatron_deepseek.settings import PipelineSettings  # noqa: E402
from megatron_deepseek.training.trainer import Trainer, TrainingSpec  # noqa: E402

WIDTH, EXPERTS, SEQ_LENGTH = 1024, 8, 16


def config(gigabytes: float) -> ModelConfig:
    """Return a model with as many layers as fill the gigabytes of weights and moments, 12 bytes a parameter."""
    base = dict(vocab_size=4096, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=8,
                kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, q_lora_rank=256,
                moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, n_shared_experts=1, num_experts_per_tok=2,
                first_k_dense_replace=1)
    few, more = (ModelConfig(num_hidden_layers=layers, **base).num_parameters() for layers in (2, 3))
    layers = 2 + max(round((gigabytes * 1e9 / 12 - few) / (more - few)), 0)
    return ModelConfig(num_hidden_layers=layers, **base)


class Rank:
    """One rank's trainer and its measurements, seconds by kind."""

    def __init__(self, rank: int, args: argparse.Namespace, port: int, root: Path):
        torch.set_num_threads(1)
        keep_freed_memory()
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
        self.root, self.model, self.seconds = root, config(args.gigabytes), defaultdict(list)
        meshes = build_meshes(Layout(dp=args.ranks, ep=args.ranks), torch.device("cpu"))
        spec = TrainingSpec(self.model, resolve(self.model, PipelineSettings(), 1, SEQ_LENGTH), "1F1B", SEQ_LENGTH, 1)
        self.trainer = Trainer(spec, meshes)
        self.background = checkpoint.BackgroundSaver(dist.new_group(backend="gloo"))
        for name, tensor in state_to_save(self.trainer.stages, self.trainer.optimizer).items():
            if name.startswith("optimizer."):
                tensor.to_local().normal_()

    def timed(self, kind: str, work):
        """Return the result of `work` and note its seconds, from when all ranks begin to when the last ends."""
        dist.barrier()
        begin = time.perf_counter()
        result = work()
        dist.barrier()
        self.seconds[kind].append(time.perf_counter() - begin)
        return result

    def round(self, number: int) -> None:
        stages, optimizer = self.trainer.stages, self.trainer.optimizer
        state = TrainState(2 * number + 1, 0, 1)
        directory = self.timed("save", lambda: checkpoint.save(self.root, state, self.model, stages, optimizer, 1))
        self.copy("cp -r", directory, synced=False)
        self.timed("load", lambda: checkpoint.load(directory, stages, optimizer))
        self.copy("cp -r and fsync", directory, synced=True)
        self.timed("verify", lambda: verify(directory))
        state = TrainState(2 * number + 2, 0, 1)
        future = self.timed("stall of a background save", lambda: self.background.begin(
            self.root, state, self.model, stages, optimizer, 1))
        self.timed("rest of a background save", future.result)
        assert iteration_directory(self.root, state.iteration).is_dir()

    def copy(self, kind: str, directory: Path, synced: bool) -> None:
        """Copy on rank 0, while the others wait."""
        goal = self.root / "copy"

        def work():
            subprocess.run(["cp", "-r", directory, goal], check=True)
            for path in goal.iterdir() if synced else ():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

        self.timed(kind, work if dist.get_rank() == 0 else lambda: None)
        if dist.get_rank() == 0:
            shutil.rmtree(goal)


def run_rank(rank: int, args: argparse.Namespace, port: int, root: Path) -> None:
    job = Rank(rank, args, port, root)
    for number in range(args.rounds + 1):
        job.round(number)
    if rank == 0:
        report(job, args)
    dist.destroy_process_group()


def report(job: Rank, args: argparse.Namespace) -> None:
    size = sum(path.stat().st_size for path in iteration_directory(job.root, 2 * args.rounds + 2).iterdir())
    print(f"{size:,} bytes, {args.ranks} ranks, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    best = {}
    for kind, (_warm_up, *seconds) in job.seconds.items():
        best[kind] = min(seconds)
        print(f"{kind:28s} best {best[kind]:6.2f} s, {size / best[kind] / 1e6:6.0f} MB/s, of "
              + " ".join(f"{each:.2f}" for each in seconds) + " s")
    print(f"save is {best['cp -r and fsync'] / best['save']:.0%} of cp with fsync, "
          f"{best['cp -r'] / best['save']:.0%} of cp without; "
          f"load {best['cp -r'] / best['load']:.0%} of cp, with verification "
          f"{best['cp -r'] / (best['load'] + best['verify']):.0%}; "
          f"stall {best['stall of a background save'] / best['save']:.0%} of a save")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reshard-rounds", type=int, default=2, help="0 leaves the resharding out")
    parser.add_argument("--directory", type=Path, help="where the files go; needs four times the size")
    args = parser.parse_args()
    with socket.socket() as free, tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(run_rank, (args, port, Path(scratch)), nprocs=args.ranks)
        if args.reshard_rounds:
            measure_rounds(Path(scratch), Path(scratch).with_name(Path(scratch).name + "-resharded"), 2,
                           args.reshard_rounds)


if __name__ == "__main__":
    main()
