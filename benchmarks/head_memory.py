#!/usr/bin/env python3
"""Memory and time of the output head and its loss, forward and backward, with all logits at once and by chunks.

    python benchmarks/head_memory.py             peak memory at V3's size, by the allocations of meta tensors
    python benchmarks/head_memory.py --real      resident memory and processor time of real tensors at a smaller size

The first runs the code of a GPU on bfloat16 tensors that have shapes and no memory, and adds up the storages that are
alive. `csrc` stands for the kernels of csrc/ by their allocations: statistics of [T], and a gradient in the place of
the logits. The second has a process of its own for each row, float32 on the CPU.
"""

import argparse
import resource
import subprocess
import sys
import time
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.weak import WeakIdKeyDictionary  # noqa: E402

from megatron_deepseek.model.head import OutputHead  # noqa: E402
from megatron_deepseek.ops.cross_entropy import CrossEntropy  # noqa: E402

WHOLE = 2**40  # more tokens than there are: one chunk
TOKENS, V3, SMALL = 4096, (7168, 129280), (512, 8080)  # hidden size and ids; the latter V3's ids at TP 16


class OneRank:
    """A tensor-parallel group of one rank, with the methods that the head calls."""

    size, rank = 1, 0

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operators have made and that still exist; `peak` is the most at a time."""

    def __init__(self, *before: torch.Tensor):
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary({each.untyped_storage(): True for each in before})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(given):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in self._known:
                self._count(leaf.untyped_storage())
        return given

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known[storage] = True
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, count: int) -> None:
        self.now -= count


def _statistics_of_csrc(logits_Tv, labels_T, first_id):
    return tuple(torch.empty_like(labels_T, dtype=torch.float32) for _ in range(3))


def _gradient_of_csrc(logits_Tv, labels_T, first_id, max_T, sum_T, grad_T):
    return logits_Tv


# Neither is `plain`: what a GPU runs is this project's own loss, with the allocations of csrc/ or of the references.
CSRC, TORCH = CrossEntropy(_statistics_of_csrc, _gradient_of_csrc, plain=False), CrossEntropy(plain=False)


def train(chunk_size: int | None, state: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor,
          predictions: int = 1, cross_entropy: CrossEntropy = CrossEntropy()) -> None:
    """Run forward and backward of the mean losses of `predictions` predictions of each token, as MTP makes several.

    Each has a leaf of its own that shares the one weight: autograd adds up the gradients of one leaf in place, but not
    inside a mode that sees its operators.
    """
    losses = []
    for leaf in [weight.detach().requires_grad_(weight.requires_grad) for _ in range(predictions)]:
        head = OutputHead(OneRank(), lambda: leaf, chunk_size=chunk_size)
        head.cross_entropy = cross_entropy
        losses.append(-head.log_probabilities(state, labels).mean())
    sum(losses).backward()


def peak_bytes(chunk_size: int | None, hidden: int, rows: int, csrc: bool, trained: bool = True, predictions: int = 1
               ) -> int:
    """Return the peak bytes for TOKENS in bfloat16, without the state and the weight.

    Gradients count, but that of the weight only if it is `trained`.
    """
    with torch.device("meta"):
        state = torch.empty(1, TOKENS, hidden, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(rows, hidden, dtype=torch.bfloat16, requires_grad=trained)
        labels = torch.empty(1, TOKENS, dtype=torch.int64)
        with Alive(state, weight, labels) as alive:
            train(chunk_size, state, labels, weight, predictions, CSRC if csrc else TORCH)
        return alive.peak


def real(chunk_size: int, repeats: int = 2) -> None:
    """Print the MB that this process grew by, and the least seconds of processor time of a few repetitions."""
    hidden, rows = SMALL
    state, weight = torch.randn(1, TOKENS, hidden).requires_grad_(), torch.randn(rows, hidden) * hidden**-0.5
    weight.requires_grad_()
    labels, seconds = torch.randint(rows, (1, TOKENS)), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(repeats):
        start = time.process_time()
        train(chunk_size, state, labels, weight)
        seconds.append(time.process_time() - start)
        state.grad = None
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, min(seconds))


def print_peaks(hidden: int, rows: int, predictions: int) -> None:
    print(f"peak GiB beside state and weight: {TOKENS} tokens, hidden {hidden}, {rows} ids, bfloat16, predictions: "
          f"{predictions}\n"
          f"{'tokens of a chunk':>18}{'csrc':>10}{'torch':>10}{'csrc, frozen':>14}{'torch, frozen':>14}")
    for chunk_size in (WHOLE, 2048, None, 512, 256):
        row = [peak_bytes(chunk_size, hidden, rows, csrc, trained, predictions) / 2**30
               for trained in (True, False) for csrc in (True, False)]
        name = "all" if chunk_size == WHOLE else chunk_size or "by default"
        print(f"{name:>18}{row[0]:10.2f}{row[1]:10.2f}{row[2]:14.2f}{row[3]:14.2f}", flush=True)


def print_real() -> None:
    print(f"float32: {TOKENS} tokens, hidden {SMALL[0]}, {SMALL[1]} ids")
    for chunk_size in (WHOLE, 2048, 1024, 512):
        command = [sys.executable, __file__, "--chunk-size", str(chunk_size)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        megabytes, seconds = map(float, printed.split())
        name = "all" if chunk_size == WHOLE else chunk_size
        print(f"{name:>8} tokens of a chunk {megabytes:8.0f} MB {seconds:7.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="measure real tensors")
    parser.add_argument("--chunk-size", type=int, metavar="TOKENS", help="measure only this, in this process")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="RANKS", help="that share V3's ids (1)")
    parser.add_argument("--predictions", type=int, default=1, metavar="N", help="of each token, 2 with MTP (1)")
    args = parser.parse_args()
    if args.chunk_size:
        real(args.chunk_size)
    elif args.real:
        print_real()
    else:
        print_peaks(V3[0], V3[1] // args.tensor_parallel, args.predictions)


if __name__ == "__main__":
    main()
