"""Pre-training data: from `--data-path` and `--split` to endless datasets of samples (seq_length tokens and labels).

megatron-core splits, packs, shuffles and blends (BlendedMegatronDatasetBuilder over GPTDataset). One thing differs:
its GPTDataset shuffles all the epochs of a run together, so that a run resumed with more iterations would see another
order from its first sample on. Here a dataset is one epoch of Megatron's, repeated in an order that is drawn anew for
each epoch: the order depends on the seed and the number of consumed samples alone. Within one epoch it is Megatron's.
"""

import hashlib
import itertools
import math
import os
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_deepseek.data.indexed import IndexedFile, open_indexed, token_range
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.settings import DataSettings

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Blend:
    """Prefixes and their weights; `weights` None: in proportion to their tokens."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(data_path) -> Blend:
    """`--data-path`: prefixes alone, or weights and prefixes in turn. One number among them asks for the latter."""
    def refuse(why: str):
        return ValueError(f"--data-path {' '.join(data_path)}: {why}")

    if not data_path:
        raise ValueError("--data-path is missing: it takes the prefix of a dataset, or weights and prefixes")
    if not any(_is_number(entry) and not os.path.isfile(entry + ".idx") for entry in data_path):
        return Blend(tuple(data_path), None)
    if len(data_path) % 2:
        raise refuse(f"weights and prefixes must take turns, but there are {len(data_path)} entries, an odd number")
    for entry in data_path[::2]:
        if not _is_number(entry):
            raise refuse(f"weights and prefixes must take turns, but {entry!r} is no number")
        if not 0 < float(entry) < math.inf:
            raise refuse(f"the weight {entry} is not greater than 0 and finite")
    return Blend(tuple(data_path[1::2]), tuple(map(float, data_path[::2])))


def parse_split(split: str) -> tuple[float, ...]:
    """`--split`: up to three weights, for train, valid and test, as shares that add up to 1."""
    entries = split.split(",")
    if len(entries) > 3 or not all(map(_is_number, entries)):
        raise ValueError(f"--split {split}: it takes up to three numbers, for train, valid and test: 969,30,1")
    weights = [*map(float, entries), 0.0, 0.0][:3]
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(f"--split {split}: the weights must not be negative, and their sum must be greater than 0")
    return tuple(weight / sum(weights) for weight in weights)


def _is_number(entry: str) -> bool:
    try:
        return not math.isnan(float(entry))
    except ValueError:
        return False


def split_bounds(split: str, num_sequences: int) -> list[tuple[int, int]]:
    """First and end sequence of each of the three splits, rounded as megatron-core does."""
    ends = [0.0, *itertools.accumulate(parse_split(split))]
    return [(round(first * num_sequences), round(end * num_sequences)) for first, end in zip(ends, ends[1:])]


def samples_in_epoch(settings: DataSettings, file: IndexedFile) -> list[int]:
    """Whole samples in each split: a sample is seq_length tokens and one more, which the next sample begins with."""
    tokens = (int(file.lengths[first:end].sum(dtype=np.int64)) for first, end in
              split_bounds(settings.split, len(file.lengths)))
    return [max(0, count - 1) // settings.seq_length for count in tokens]


def check_data(settings: DataSettings, model_vocab_size: int, num_samples=(1, 0, 0)):
    """Refuse data that training would trip over, by a ValueError that names the argument, its value and the conflict.

    To be called once, before anything is built. `num_samples` of (train, valid, test): splits with 0 are not needed.
    Token ids are all looked at up to 2^28 tokens a file, beyond that evenly spread chunks of as many tokens are:
    `check_token_ids` then looks at each batch.
    """
    blend = parse_blend(settings.data_path)
    if settings.seq_length < 1:
        raise ValueError(f"--seq-length {settings.seq_length}: it must be at least 1")
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    if tokenizer.vocab_size > model_vocab_size:
        raise ValueError(f"--tokenizer-model {settings.tokenizer_model}: its vocabulary of {tokenizer.vocab_size} is "
                         f"larger than the model's vocab_size {model_vocab_size}")
    for prefix in blend.prefixes:
        file = open_indexed(prefix, "--data-path")
        _check_samples(settings, file, num_samples)
        least, greatest = token_range(file)
        if least < 0 or greatest >= model_vocab_size:
            raise ValueError(f"--data-path {prefix}: token ids from {least} to {greatest} in {prefix}.bin, outside "
                             f"the model's vocab_size {model_vocab_size}")
    _check_cache(settings, blend)


def _check_samples(settings: DataSettings, file: IndexedFile, num_samples):
    bounds = split_bounds(settings.split, len(file.lengths))
    for name, needed, there, (first, end) in zip(SPLITS, num_samples, samples_in_epoch(settings, file), bounds):
        if needed and not there:
            tokens = int(file.lengths[first:end].sum(dtype=np.int64))
            raise ValueError(f"--data-path {file.prefix}: its {name} split (--split {settings.split}: {end - first} "
                             f"of {len(file.lengths)} sequences, {tokens} tokens) is too small for one sample of "
                             f"--seq-length {settings.seq_length} + 1 tokens")


def _check_cache(settings: DataSettings, blend: Blend):
    folder = cache_folder(settings, blend)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--data-cache-path {settings.data_cache_path}: cannot write indices to {folder}: "
                         f"{error.strerror}") from error


def check_token_ids(tokens, vocab_size: int, prefix: str):
    """Cheap enough for each batch: an id outside the embedding would otherwise be a crash deep in a kernel, or none."""
    least, greatest = int(tokens.min()), int(tokens.max())
    if least < 0 or greatest >= vocab_size:
        raise ValueError(f"--data-path {prefix}: token ids from {least} to {greatest} in a batch, outside the model's "
                         f"vocab_size {vocab_size}")


def cache_folder(settings: DataSettings, blend: Blend) -> Path:
    """`--data-cache-path`, else `cache/` beside the first dataset."""
    return Path(settings.data_cache_path or Path(blend.prefixes[0]).parent / "cache")


def build_datasets(settings: DataSettings, num_samples: tuple[int, int, int]):
    """Datasets of (train, valid, test), each with at least its `num_samples`; None where that is 0.

    An item is a dict with tokens, labels [seq_length] int64 and loss_mask [seq_length] float. To be called by every
    rank, with the default process group initialised or in a single process without one: rank 0 builds the indices in
    the cache, the others wait at megatron-core's barriers and map them. On several nodes the cache must be shared.
    """
    blend = parse_blend(settings.data_path)
    files = [open_indexed(prefix, "--data-path") for prefix in blend.prefixes]
    weights = blend.weights or tuple(float(len(file.ids)) for file in files)
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    folder = cache_folder(settings, blend)
    with warnings.catch_warnings(), _process_group() as rank:
        warnings.simplefilter("ignore")  # megatron-core's import says four times that it has no Transformer Engine
        from megatron_deepseek.data.epochs import build_splits
        if rank == 0:
            drop_broken_indices(folder)
        return build_splits(settings, blend.prefixes, weights, num_samples, tokenizer.eod, folder, fingerprint(files))


def fingerprint(files: list[IndexedFile]) -> str:
    """Of the sequence lengths, on which the cached indices rest: data made anew under an old name has other indices."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(len(file.lengths).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(file.lengths).data)
    return digest.hexdigest()


def drop_broken_indices(folder: Path):
    """Remove cached indices that a killed run left half written, which megatron-core would take for whole."""
    for path in folder.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError):
            path.unlink()


@contextmanager
def _process_group():
    """This process's rank. Blending asks torch.distributed for it, so one process alone gets a group for that while."""
    import torch.distributed as dist
    if dist.is_initialized():
        yield dist.get_rank()
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield 0
    finally:
        dist.destroy_process_group()
