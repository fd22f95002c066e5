#!/usr/bin/env python3
"""Seconds from the data arguments to the first sample of a blend of many datasets, beside megatron-core's builder.

Each row is a process of its own, measured from its first line with torch imported, as in a training rank: cold with an
empty cache, warm with the cache of the row before. Both read the same first samples, and the check is that their sums
agree. The pages of the datasets are in memory, since they were just written.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

VOCABULARY, SEQ_LENGTH, SAMPLES_READ = 8000, 1024, 64


def write_datasets(folder: Path, datasets: int, documents: int):
    """Write the datasets of the blend. Lengths of documents are log-normal, about 400 tokens on average."""
    import numpy as np

    from megatron_deepseek.data.indexed import IndexedWriter
    random = np.random.default_rng(0)
    for number in range(datasets):
        lengths = random.lognormal(5.5, 1, documents).astype(np.int64) + 1
        writer = IndexedWriter(str(folder / f"{number:05d}"), "<u2")
        writer.add(random.integers(0, VOCABULARY, lengths.sum()).astype("<u2"), lengths[:, None].tolist())
        writer.finish()
        writer.publish()


def start_ours(prefixes, weights, num_samples: int, cache: str):
    from megatron_deepseek.data.pretraining import build_datasets, check_data
    from megatron_deepseek.settings import DataSettings
    path = tuple(str(part) for pair in zip(weights, prefixes) for part in pair)
    settings = DataSettings(path, SEQ_LENGTH, split="90,10,0", data_cache_path=cache, tokenizer_type="NullTokenizer",
                            tokenizer_model=str(VOCABULARY))
    check_data(settings, VOCABULARY + 1, (num_samples, 100, 0))
    return build_datasets(settings, (num_samples, 100, 0))[0]


def start_megatron(prefixes, weights, num_samples: int, cache: str):
    """Start by megatron-core: all epochs of the run shuffled together, in one thread, as Megatron-LM's default is."""
    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        eod, vocab_size, unique_identifiers = VOCABULARY, None, {}

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = GPTDatasetConfig(random_seed=1234, sequence_length=SEQ_LENGTH, blend=(prefixes, weights), split="90,10,0",
                              path_to_cache=cache, tokenizer=Tokenizer, reset_position_ids=False,
                              reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False)
    return BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 100, 0], lambda: True, config).build()[0]


def measure(which: str, folder: str, num_samples: int, cache: str):
    """Measure a start in a process of its own, whose answer is one line of JSON."""
    import torch  # noqa: F401
    begin, cpu = time.perf_counter(), time.process_time()
    prefixes = sorted(str(path.with_suffix("")) for path in Path(folder).glob("*.idx"))
    weights = [1.0 + number % 7 for number in range(len(prefixes))]
    start = {"ours": start_ours, "megatron-core": start_megatron}[which]
    dataset = start(prefixes, weights, num_samples, cache)
    total = sum(int(dataset[index]["tokens"].sum()) for index in range(SAMPLES_READ))
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({"seconds": time.perf_counter() - begin,
                      "cpu": time.process_time() - cpu + children.ru_utime + children.ru_stime,
                      "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "sum": total}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=int, default=300)
    parser.add_argument("--documents", type=int, default=2000, help="of each dataset")
    parser.add_argument("--samples", type=int, default=100_000, help="of the run")
    parser.add_argument("--rounds", type=int, default=1, help="the best of so many")
    parser.add_argument("--folder", type=Path, help="where datasets and caches are written for the while")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_datasets(Path(folder), args.datasets, args.documents)
        print(f"{args.datasets} datasets of {args.documents} documents, {args.samples} samples of {SEQ_LENGTH} tokens, "
              f"{os.cpu_count()} cores, best of {args.rounds}\n{'':24} {'seconds':>8} {'cpu':>8} {'peak MB':>8}")
        for which in ("megatron-core", "ours"):
            rounds = {"cold": [], "warm": []}
            for _ in range(args.rounds):
                cache = Path(folder) / f"cache {which}"
                shutil.rmtree(cache, ignore_errors=True)
                for state in rounds:
                    rounds[state].append(run(which, folder, args.samples, cache))
            for state, results in rounds.items():
                best = min(results, key=lambda result: result["seconds"])
                print(f"{which + ', ' + state:24} {best['seconds']:8.2f} {best['cpu']:8.2f} {best['peak'] / 1e6:8.0f}"
                      f"   (sum of the first {SAMPLES_READ} samples: {best['sum']})")


def run(which: str, folder: str, num_samples: int, cache: Path) -> dict:
    command = [sys.executable, "-W", "ignore", __file__, "--one", which, folder, str(num_samples), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{which} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main()
