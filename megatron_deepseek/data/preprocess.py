"""From JSONL text to Megatron's indexed datasets: `{output_prefix}_{key}_document.bin` and `.idx`.

Documents keep the order of the input. The bytes are those that Megatron-LM's preprocess_data.py writes for the same
ids (with one partition; its partitions deal the lines out and so reorder them, unless --keep-sequential-samples).
Lines stream through worker processes, a bounded number in flight, so memory does not grow with the corpus. Nothing
has its final name before all of it is written: a killed run leaves files ending in .tmp, which the next one replaces.
"""

import functools
import itertools
import os
import sys
import time
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from megatron_deepseek.data.indexed import written_whole
from megatron_deepseek.data.jsonl import Line, find_inputs, parse_texts, read_lines
from megatron_deepseek.data.sentences import sentence_splitter
from megatron_deepseek.data.tokenizer import Tokenizer, build_tokenizer

LINES_PER_TASK = 1024
BYTES_PER_TASK = 1 << 19
TASKS_IN_FLIGHT_PER_WORKER = 4


@dataclass(frozen=True)
class PreprocessSettings:
    """Field names are the arguments of Megatron-LM's preprocess_data.py."""

    input: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str = "HuggingFaceTokenizer"
    tokenizer_model: str | None = None
    json_keys: tuple[str, ...] = ("text",)
    split_sentences: bool = False
    keep_newlines: bool = False
    lang: str = "english"
    append_eod: bool = False
    workers: int = 1
    log_interval: int = 1000

    def __post_init__(self):
        for name in ("workers", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be at least 1")
        repeated = next((key for key in self.json_keys if self.json_keys.count(key) > 1), None)
        if repeated is not None:
            raise ValueError(f"--json-keys {' '.join(self.json_keys)}: {repeated} is given twice")

    @property
    def level(self) -> str:
        return "sentence" if self.split_sentences else "document"

    def prefix_of(self, key: str) -> str:
        """What `--data-path` takes afterwards."""
        return f"{self.output_prefix}_{key}_{self.level}"


@dataclass(frozen=True)
class Documents:
    """One key of some lines, encoded: the ids of all sequences end to end, and each document's sequence lengths.

    A document without tokens has no sequences, but is still counted, as in Megatron-LM.
    """

    ids: np.ndarray
    sequence_lengths: list[list[int]]


@dataclass(frozen=True)
class Summary:
    """What was written; `prefixes` in the order of the keys."""

    prefixes: tuple[str, ...]
    documents: int
    tokens: int
    seconds: float


def id_dtype(vocab_size: int) -> type:
    """Megatron's rule (DType.optimal_dtype)."""
    return np.uint16 if vocab_size < 65500 else np.int32


class Encoder:
    """Text to `Documents`, by the settings. Lives in the process that uses it: a tokenizer is slow to pass around."""

    def __init__(self, settings: PreprocessSettings, tokenizer: Tokenizer):
        self.settings = settings
        self.tokenizer = tokenizer
        self.split = (sentence_splitter(settings.lang, settings.keep_newlines) if settings.split_sentences
                      else lambda text: [text])

    def encode(self, lines: list[Line]) -> list[Documents]:
        """One `Documents` for each key."""
        texts = [parse_texts(line, self.settings.json_keys) for line in lines]
        return [self._encode_key(lines, list(column)) for column in zip(*texts, strict=True)]

    def _encode_key(self, lines: list[Line], values: list) -> Documents:
        sentences = [value if isinstance(value, list) else self.split(value) for value in values]
        encoded = iter(self._encode_batch(lines, sentences))
        ids, lengths = [], []
        for parts in sentences:
            sequences = [sequence for sequence in itertools.islice(encoded, len(parts)) if sequence]
            if sequences and self.settings.append_eod:
                sequences[-1].append(self.tokenizer.eod)
            ids.extend(itertools.chain.from_iterable(sequences))
            lengths.append([len(sequence) for sequence in sequences])
        return Documents(np.array(ids, dtype=id_dtype(self.tokenizer.vocab_size)), lengths)

    def _encode_batch(self, lines: list[Line], sentences: list[list[str]]) -> list[list[int]]:
        """All sentences at once; where that fails, line by line, to name the one at fault."""
        try:
            return self.tokenizer.encode_batch(list(itertools.chain.from_iterable(sentences)))
        except ValueError:
            for line, parts in zip(lines, sentences, strict=True):
                try:
                    self.tokenizer.encode_batch(parts)
                except ValueError as error:
                    raise line.refuse(str(error)) from error
            raise


@functools.lru_cache(maxsize=1)
def _encoder_of(settings: PreprocessSettings) -> Encoder:
    """One encoder a worker process: built at its first task, kept for the others."""
    return Encoder(settings, build_tokenizer(settings.tokenizer_type, settings.tokenizer_model))


def _encode_task(settings: PreprocessSettings, lines: list[Line]) -> list[Documents]:
    return _encoder_of(settings).encode(lines)


def tasks_of(paths: list[str]):
    """The lines of all files in runs of at most `LINES_PER_TASK`, that end once they reach `BYTES_PER_TASK`."""
    task, size = [], 0
    for line in itertools.chain.from_iterable(map(read_lines, paths)):
        task.append(line)
        size += len(line.content)
        if len(task) == LINES_PER_TASK or size >= BYTES_PER_TASK:
            yield task
            task, size = [], 0
    if task:
        yield task


def encode_tasks(settings: PreprocessSettings, tasks):
    """(task, its documents) in order: in this process for one worker, else in a pool that never runs far ahead."""
    encode = functools.partial(_encode_task, settings)
    if settings.workers == 1:
        for task in tasks:
            yield task, encode(task)
        return
    with ProcessPoolExecutor(settings.workers, get_context("spawn"), _one_thread_each) as pool:
        pending = deque()
        try:
            for task in tasks:
                pending.append((task, pool.submit(encode, task)))
                if len(pending) >= settings.workers * TASKS_IN_FLIGHT_PER_WORKER:
                    task, future = pending.popleft()
                    yield task, future.result()
            for task, future in pending:
                yield task, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _one_thread_each():
    """The tokenizers library would start a thread for each core in each worker."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def preprocess(settings: PreprocessSettings, say=functools.partial(print, file=sys.stderr)) -> Summary:
    """Write the dataset of each key. ValueError, in one line, for whatever is wrong with the input or the output."""
    paths = find_inputs(settings.input)
    encoder = _encoder_of(settings)
    progress = Progress(settings.log_interval, say)
    prefixes = tuple(map(settings.prefix_of, settings.json_keys))
    try:
        with written_whole(prefixes, id_dtype(encoder.tokenizer.vocab_size)) as writers:
            for task, encoded in encode_tasks(settings, tasks_of(paths)):
                for writer, documents in zip(writers, encoded, strict=True):
                    writer.add(documents.ids, documents.sequence_lengths)
                progress.add(len(task), sum(len(line.content) for line in task))
            if not progress.documents:
                raise ValueError(f"--input {' '.join(settings.input)}: no documents there")
            tokens = sum(writer.num_tokens for writer in writers)
    except BrokenExecutor as error:
        raise ValueError(f"--workers {settings.workers}: a worker process died (killed, or out of memory)") from error
    except OSError as error:
        raise ValueError(f"--output-prefix {settings.output_prefix}: cannot write there: {error}") from error
    return Summary(prefixes, progress.documents, tokens, progress.seconds)


class Progress:
    """Counts what is done and says so, at most once for each `interval` documents and half a second."""

    def __init__(self, interval: int, say):
        self.interval, self.say = interval, say
        self.documents = self.bytes = 0
        self.start = self.said_at = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def add(self, documents: int, size: int):
        """`size`: bytes of JSONL."""
        before = self.documents // self.interval
        self.documents += documents
        self.bytes += size
        now = time.perf_counter()
        if self.documents // self.interval > before and now - self.said_at >= 0.5:
            self.said_at = now
            rate = 1 / self.seconds
            self.say(f"Processed {self.documents} documents ({self.documents * rate:.0f} docs/s, "
                     f"{self.bytes * rate / 1e6:.2f} MB/s)")
