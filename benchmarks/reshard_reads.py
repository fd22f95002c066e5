#!/usr/bin/env python3
"""The files and bytes that each rank of a real job reads of a checkpoint, before and after resharding for that job.

A job of gloo ranks builds the model, then loads weights and moments. Each rank counts the data files that it opens
(Python's audit hook) and the bytes that it reads (`rchar` of /proc/self/io, which is all reads, a few kilobytes of
which are sockets). "own" are the bytes of the rank's shards. There are two readers: this project's, and DCP's own
FileSystemReader.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from native import ITERATION, write_checkpoint  # noqa: E402

from megatron_deepseek.checkpoint.job.distributed import load  # noqa: E402
from megatron_deepseek.checkpoint.job.state import state_to_save  # noqa: E402
from megatron_deepseek.checkpoint.tracker import iteration_directory  # noqa: E402
from megatron_deepseek.cli.reshard_checkpoint import main as reshard  # noqa: E402
from megatron_deepseek.model.architecture.config import ModelConfig  # noqa: E402
from megatron_deepseek.parallel.layout import Layout  # noqa: E402
from megatron_deepseek.parallel.mesh import build_meshes  # noqa: E402
from megatron_deepseek.planning.pipeline_balance import stages  # noqa: E402
from megatron_deepseek.training.trainer import TrainingSpec, Trainer  # noqa: E402

LAYOUTS = (Layout(dp=2, tp=2, ep=4), Layout(dp=8, ep=8), Layout(dp=2, tp=2, pp=2, ep=2), Layout(dp=2, tp=4, ep=4))


@dataclass(frozen=True)
class Reads:
    """The counts of one rank: data files opened, bytes read, bytes of its own shards, seconds of the load."""

    files: int
    read: int
    own: int
    seconds: float


def rank_main(rank: int, layout: Layout, root: Path, stock: bool, store: Path, answers) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), layout.world_size), rank=rank,
                            world_size=layout.world_size)
    directory = iteration_directory(root, ITERATION)
    model = ModelConfig.from_file(directory / "config.json")
    spec = TrainingSpec(model, stages(model, layout.pp), "1F1B", 64, 1)
    trainer = Trainer(spec, build_meshes(layout, torch.device("cpu")))
    opened: set[str] = set()
    sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)
    dist.barrier()
    before, begin = _rchar(), time.perf_counter()
    state = state_to_save(trainer.stages, trainer.optimizer)
    if stock:
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory))
    else:
        load(directory, trainer.stages, trainer.optimizer)
    seconds, read = time.perf_counter() - begin, _rchar() - before
    own = sum((each.to_local() if hasattr(each, "to_local") else each).nbytes for each in state.values())
    answers.put((rank, Reads(sum(name.endswith(".distcp") for name in opened), read, own, seconds)))
    answers.close()
    answers.join_thread()  # waits until the answer is sent
    dist.barrier()
    os._exit(0)  # an interpreter takes long to end


def _rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def job(layout: Layout, root: Path, stock: bool) -> list[Reads]:
    """Run a job whose ranks are forked from this process, where everything is imported."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        processes = [context.Process(target=rank_main, args=(rank, layout, root, stock, store, answers))
                     for rank in range(layout.world_size)]
        for process in processes:
            process.start()
        found = dict(answers.get(timeout=120) for _ in processes)
        for process in processes:
            process.join()
    return [found[rank] for rank in range(layout.world_size)]


def resharded(layout: Layout, root: Path, save: Path) -> Path:
    sizes = {"tensor-model-parallel": layout.tp, "pipeline-model-parallel": layout.pp, "expert-model-parallel":
             layout.ep, "data-parallel": layout.dp}
    status = reshard(["reshard", "--load", str(root), "--save", str(save), "--no-verify",
                      *(text for name, size in sizes.items() for text in (f"--{name}-size", str(size)))])
    assert status == 0
    return save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.3)
    parser.add_argument("--json", type=Path, help="the counts of every rank")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        size = write_checkpoint(source, args.gigabytes)
        print(f"{size:,} bytes, written by 4 ranks (TP 2, DP 2, EP 4)")
        print(f"{'loaded by':28s} {'reader':9s} {'files':12s} {'opened (most)':>13s} {'read (most, MB)':>15s} "
              f"{'own':>6s} {'seconds':>8s}")
        for number, layout in enumerate(LAYOUTS):
            after = resharded(layout, source, Path(scratch) / str(number))
            for stock in (False, True):
                for name, root in (("as written", source), ("resharded", after)):
                    reads = job(layout, root, stock)
                    results.append({"layout": asdict(layout), "reader": "DCP" if stock else "own", "files": name,
                                    "ranks": [asdict(each) for each in reads]})
                    sizes = " ".join(f"{key} {value}" for key, value in asdict(layout).items() if int(value) > 1)
                    print(f"{sizes:28s} {'DCP' if stock else 'ours':9s} {name:12s} "
                          f"{max(each.files for each in reads):13d} {max(each.read for each in reads) / 1e6:15.1f} "
                          f"{max(each.own for each in reads) / 1e6:6.1f} {max(each.seconds for each in reads):8.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
