"""Text to arrays of ids, by the fastest library that gives the right ids.

`tokenizers` defines the right ids, as in Megatron-LM. gigatoken (MIT, Rust) is 20 to 100 times faster and is meant to
give the same ids; `auto` uses it only if both give the same ids for a sample of the input and for some hard cases.
"""

import ctypes
import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_deepseek.data.preprocess.settings import Content
from megatron_deepseek.data.preprocess.workers import die_with
from megatron_deepseek.data.tokenizer import (
    BOS, EOD, HuggingFaceTokenizer, IdOutsideVocabulary, Tokenizer, build_tokenizer, find_tokenizer_json)
from megatron_deepseek.packages import how_to_install

PROBES = (
    "", " ", "\n", "\r\n\r\n \t\n", "a" * 300,
    "Hello,world!  It's 1234567 o'clock...\n\n\tdef f(x):\n        return x\n",
    "深度求索，人工智能。日本語のテキストと한국어 텍스트", "نص عربي ไทย हिन्दी é e\u0301 ﬁ Å", "👩‍👩‍👧‍👦🏳️‍🌈 \U0001f600",
    "\0\x01\x7f\ufeff\u200b\u2028\u00a0\u3000", f"a{EOD}b {BOS}c<|im_end|> <｜User｜>x", "١٢٣ ⅷ ½ 1,000.00 12a34",
)
MEMORY_OF_ALL_CACHES = 1 << 29
LEAST_CACHE, MOST_CACHE = 1 << 26, 1 << 28


@dataclass(frozen=True)
class SpecialIds:
    """The size and the special ids of a `Tokenizer`, whose encoding may be another library's."""

    vocab_size: int
    eod: int
    bos: int | None
    fim: tuple[int, int, int] | None


class Encoder(Protocol):
    """Turns texts into arrays of ids. `backend` is the name of the library, for the report."""

    backend: str
    special: SpecialIds

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text. Raise ValueError where one cannot be encoded."""


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    return SpecialIds(tokenizer.vocab_size, tokenizer.eod, tokenizer.bos, tokenizer.fim)


class TokenizerEncoder:
    """Encodes by any `Tokenizer` of tokenizer.py."""

    def __init__(self, tokenizer: Tokenizer, backend: str):
        self.backend, self.special = backend, special_ids(tokenizer)
        self._tokenizer = tokenizer

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encoded = _without_panic("tokenizers", lambda: self._tokenizer.encode_batch(texts))
        return [np.array(ids, np.int64) for ids in encoded]


class GigatokenEncoder:
    """Encodes by gigatoken, in one thread.

    The library keeps the ids of every word that it has met, without bound. Once the process has grown by `cache_bytes`
    it is loaded anew, which takes 0.5 s, and seconds until it knows the usual words again.
    """

    def __init__(self, path: Path, cache_bytes: int):
        """Load the file. Raise ValueError where gigatoken cannot use it. `choose_encoder` sets `special`."""
        self.backend = "gigatoken"
        self.special: SpecialIds | None = None
        self._path, self._cache_bytes = path, cache_bytes
        self._load()

    def _load(self):
        from gigatoken.gigatoken_rs import load_hf_json
        self._tokenizer = None
        return_freed_memory()
        self._tokenizer = _without_panic("gigatoken", lambda: load_hf_json(self._path.read_bytes()))
        self._limit = resident_bytes() + self._cache_bytes

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if resident_bytes() > self._limit:
            self._load()
        encode = self._tokenizer.encode
        return _without_panic("gigatoken", lambda: [encode(text) for text in texts])


def _without_panic(library: str, call: Callable):
    """Return `call()`. Raise ValueError for Rust's panics, which are no Exceptions, and other errors of a library."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError, ValueError):
        raise
    except BaseException as error:
        raise ValueError(f"{library}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def resident_bytes() -> int:
    """Return the bytes of this process's memory that are no mapped files; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            fields = file.read().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def return_freed_memory():
    """Give freed small blocks back to the system: what glibc keeps of them would count against the limit."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def choose_encoder(content: Content, backend: str, workers: int, sample: Callable[[], list[str]], say) -> Encoder:
    """Return the encoder of `--tokenizer-backend`. `sample` gives texts of the input, on which `auto` compares.

    Raise ValueError if the backend that was asked for cannot be used.
    """
    if content.tokenizer_type != "HuggingFaceTokenizer":
        if backend == "gigatoken":
            raise ValueError(f"--tokenizer-backend gigatoken is for HuggingFaceTokenizer only, "
                             f"not --tokenizer-type {content.tokenizer_type}")
        return TokenizerEncoder(build_tokenizer(content.tokenizer_type, content.tokenizer_model), "built in")
    path = find_tokenizer_json(content.tokenizer_model)
    if backend == "tokenizers":
        return TokenizerEncoder(HuggingFaceTokenizer(path), "tokenizers")
    if importlib.util.find_spec("gigatoken") is None:
        why = f"gigatoken is not installed: {how_to_install('gigatoken')}"
        encoder = None
    else:
        cache_bytes = min(max(MEMORY_OF_ALL_CACHES // workers, LEAST_CACHE), MOST_CACHE)
        encoder, why = _checked_gigatoken(path, cache_bytes, sample() if backend == "auto" else [])
    if encoder is not None:
        return encoder
    if backend == "gigatoken":
        raise ValueError(f"--tokenizer-backend gigatoken: {why}")
    say(f"--tokenizer-backend auto: tokenizers, which is slower, because {why}")
    return TokenizerEncoder(HuggingFaceTokenizer(path), "tokenizers")


def _checked_gigatoken(path: Path, cache_bytes: int, texts: list[str]) -> tuple[GigatokenEncoder | None, str]:
    """Return gigatoken's encoder and "" if it gives the ids of tokenizers for `texts`, or None and why it doesn't.

    tokenizers works in a process of its own at the same time, so that its time is hidden and its memory is freed.
    """
    texts = [*PROBES, *texts] if texts else []
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    reference = fork.Process(target=_send_reference, args=(theirs, ours, path, texts, os.getpid()), daemon=True)
    reference.start()
    theirs.close()
    try:
        encoder, why = GigatokenEncoder(path, cache_bytes), ""
        encoded = encoder.encode_batch(texts)
    except ValueError as error:
        encoder, encoded, why = None, [], str(error)
    special, expected = _receive(ours)
    reference.join()
    if encoder is None:
        return None, why
    different = next((text for text, a, b in zip(texts, encoded, expected) if not np.array_equal(a, b)), None)
    if different is not None:
        return None, f"gigatoken's ids differ from its ids, in a text that begins {different[:40]!r}"
    encoder.special = special
    return encoder, ""


def _send_reference(connection, received, path: Path, texts: list[str], parent: int):
    die_with(parent)
    received.close()
    try:
        encoder = TokenizerEncoder(HuggingFaceTokenizer(path), "tokenizers")
        connection.send((encoder.special, encoder.encode_batch(texts) if texts else []))
    except ValueError as error:
        connection.send(error)


def _receive(connection):
    try:
        received = connection.recv()
    except EOFError as error:
        raise ValueError("--tokenizer-model: the process that loads it with tokenizers died") from error
    if isinstance(received, ValueError):
        raise received
    return received


def check_ids(ids: np.ndarray, vocab_size: int):
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise IdOutsideVocabulary(f"ids from {ids.min()} to {ids.max()}, not in [0, {vocab_size})")
