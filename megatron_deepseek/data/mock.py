"""--mock-data: documents without meaning, as Megatron-LM's MockGPTDataset has them, in an indexed dataset.

A document counts 1, 2, 3, ... and ends, after a length that is drawn. The files are made where they are missing and are
the same on every machine, so that nodes need not share them and a run that is resumed reads what it read before.
"""

import dataclasses
import getpass
import os
import secrets
import tempfile
from pathlib import Path

import numpy as np

from megatron_deepseek.data.indexed import IndexedWriter
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.settings import DataSettings

DOCUMENTS, LONGEST = 4096, 4096  # about 8.4 million tokens: enough for every split of a usual --split


def with_mock_data(settings: DataSettings) -> DataSettings:
    """Return settings that name the files of mock data, which are there then; other settings as they are."""
    if not settings.mock_data or settings.data_path:
        return settings
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    folder = Path(settings.data_cache_path or Path(tempfile.gettempdir()) / f"mock-data-{getpass.getuser()}")
    prefix = folder / f"mock-{tokenizer.vocab_size}-{tokenizer.eod}"
    if not prefix.with_suffix(".idx").is_file():
        try:
            _write(prefix, tokenizer.vocab_size, tokenizer.eod)
        except OSError as error:
            raise ValueError(f"--mock-data: {folder} cannot be written: {error.strerror or error}; --data-cache-path "
                             "puts it elsewhere") from error
    return dataclasses.replace(settings, data_path=(str(prefix),))


def _write(prefix: Path, vocab_size: int, eod: int) -> None:
    """Write under a name of this process alone, and rename; whoever else does the same writes the same bytes."""
    own = prefix.with_name(f"{prefix.name}.{secrets.token_hex(8)}")
    writer = IndexedWriter(str(own), np.uint16 if vocab_size < 65500 else np.int32)
    try:
        for length in np.random.default_rng(0).integers(1, LONGEST, DOCUMENTS, endpoint=True):
            writer.add(document(int(length), vocab_size, eod), [[int(length)]])
        writer.finish()
        for suffix in (".bin", ".idx"):
            os.replace(f"{own}{suffix}.tmp", f"{prefix}{suffix}")
    finally:
        writer.discard()


def document(length: int, vocab_size: int, eod: int) -> np.ndarray:
    """Return `length` ids that count from 1, begin anew where the vocabulary ends and never are `eod`, but the last."""
    ids = 1 + np.arange(length, dtype=np.int64) % max(vocab_size - 1, 1)
    ids[ids == eod] = 0
    ids[-1] = eod
    return ids
