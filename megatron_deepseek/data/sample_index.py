"""The index of one dataset's samples: documents shuffled and laid end to end, cut every seq_length tokens, shuffled.

That is an epoch of Megatron's GPTDataset, to the sample (a test compares them). An index is a file of four arrays, one
behind the other, named after all that decides its content; it gets that name when it is whole. N samples, D sequences:

    order      uint32[N]    the place that the k-th sample has in the stream
    documents  int32[D]     sequences of the dataset in their shuffled order
    starts     int32[N+1]   by place: which of `documents` a sample begins in
    offsets    int32[N+1]   and at which of its tokens

and a seal (cache.py); 64 bits where 32 are too few. Run as a module it builds what standard input asks for: see
`build_all`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_deepseek.data.cache import sealing
from megatron_deepseek.data.index_file import mapped, open_index

VERSION = 1
FEW_SEQUENCES = 4_000_000  # indexed in about a second: not worth starting processes for


@dataclass(frozen=True)
class PackedSplit:
    """The content of an index: the `tokens` tokens in the sequences [first, end) of a dataset.

    `digest` is that of the lengths of all its sequences.
    """

    prefix: str
    digest: str
    first: int
    end: int
    tokens: int
    seq_length: int
    seed: int

    @property
    def num_samples(self) -> int:
        """Return the number of samples: each is seq_length tokens and one more, which the next sample begins with."""
        return max(0, self.tokens - 1) // self.seq_length

    @property
    def file_name(self) -> str:
        identity = json.dumps([VERSION, self.digest, self.first, self.end, self.seq_length, self.seed])
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest() + ".samples"

    @property
    def sections(self) -> tuple[tuple[np.dtype, int], ...]:
        """Return (dtype, number of entries) of order, documents, starts and offsets."""
        samples, sequences = self.num_samples, self.end - self.first
        place = np.dtype("<u4") if samples < 2**32 else np.dtype("<u8")
        sequence = np.dtype("<i4") if self.end < 2**31 else np.dtype("<i8")
        return (place, samples), (sequence, sequences), (sequence, samples + 1), (np.dtype("<i4"), samples + 1)

    @property
    def file_size(self) -> int:
        return sum(dtype.itemsize * count for dtype, count in self.sections)

    def map(self, folder: Path) -> tuple[np.ndarray, ...]:
        """Return the four arrays, mapped from the file."""
        offset, arrays = 0, []
        for dtype, count in self.sections:
            arrays.append(mapped(folder / self.file_name, dtype, offset, count))
            offset += dtype.itemsize * count
        return tuple(arrays)


def build(split: PackedSplit, folder: Path):
    """Write the index of one split."""
    index = open_index(split.prefix, "dataset")
    dtypes = [dtype for dtype, _ in split.sections]
    random = np.random.RandomState(split.seed)
    documents = np.arange(split.first, split.end, dtype=dtypes[1])
    random.shuffle(documents)
    lengths = index.map(index.lengths)[split.first:split.end][documents - split.first]
    ends = np.cumsum(lengths, dtype=np.int64)
    order = np.arange(split.num_samples, dtype=dtypes[0])
    random.shuffle(order)
    positions = np.arange(split.num_samples + 1, dtype=np.int64) * split.seq_length
    starts = np.searchsorted(ends, positions, "right")
    offsets = positions - (ends[starts] - lengths[starts])
    with sealing(folder / split.file_name) as file:
        for array, dtype in zip((order, documents, starts, offsets), dtypes):
            file.write(array.astype(dtype, copy=False).data)


def build_all(missing: list[PackedSplit], folder: Path, workers: int | None = None, built=lambda split: None):
    """Build the indices of `missing` in `folder`, by processes if they are large, and call `built` with each.

    Without `workers` there is one process for each core of this one. They run this module alone and import no torch.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(missing))
    if workers < 2 or sum(split.end - split.first for split in missing) < FEW_SEQUENCES:
        for split in missing:
            build(split, folder)
            built(split)
    else:
        _build_by_processes(missing, folder, workers, built)


def _build_by_processes(splits: list[PackedSplit], folder: Path, workers: int, built):
    """Start the processes, each with a share of similar size; each answers with a line for each index it wrote."""
    shares: list[list[PackedSplit]] = [[] for _ in range(workers)]
    for split in sorted(splits, key=lambda split: split.first - split.end):
        min(shares, key=lambda share: sum(split.end - split.first for split in share)).append(split)
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    processes = [subprocess.Popen([sys.executable, "-m", __name__], text=True,
                                  env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in shares]
    try:
        for process, share in zip(processes, shares):
            with contextlib.suppress(BrokenPipeError):  # it is dead already, which its answer will tell
                asked = {"folder": str(folder), "splits": [dataclasses.asdict(split) for split in share]}
                json.dump(asked, process.stdin)
                process.stdin.close()
        for process, share in zip(processes, shares):
            for split in share:
                answer = json.loads(process.stdout.readline() or "null")
                if answer != split.file_name:
                    raise ValueError(answer["error"] if answer else f"the process that indexes {split.prefix} in "
                                     f"{folder} ended with status {process.wait()} (-9: perhaps for lack of memory)")
                built(split)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def main():
    """Answer with a line of JSON for each index: its file's name or, as the last, {"error": what went wrong}."""
    asked = json.load(sys.stdin)
    try:
        for fields in asked["splits"]:
            split = PackedSplit(**fields)
            build(split, Path(asked["folder"]))
            print(json.dumps(split.file_name), flush=True)
    except (ValueError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
