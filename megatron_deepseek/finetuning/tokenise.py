"""Rows to an indexed dataset with its loss weights: by workers, in parts, so that a killed run goes on where it was.

A part is whole once its summary exists, which is written last. When all are there they are put together, in the order
of the input; the bytes depend on the input and the settings alone, not on the number of workers. Memory is that of a
part in each worker, and 16 bytes for each sample at the end.
"""

import fcntl
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_deepseek.data.indexed import IndexedWriter, open_indexed, written_whole
from megatron_deepseek.data.preprocess.files import write_json
from megatron_deepseek.data.preprocess.inputs import InputFile
from megatron_deepseek.data.preprocess.part import id_dtype
from megatron_deepseek.data.preprocess.progress import Progress
from megatron_deepseek.data.preprocess.workers import Counters, run_tasks
from megatron_deepseek.finetuning.conversation import BadRow, Conversation, Group
from megatron_deepseek.finetuning.encode import Encoded, Encoder
from megatron_deepseek.finetuning.loss_weights import LossWeights, WeightsWriter, write_weights
from megatron_deepseek.finetuning.reading import Part, parse_line, parts_of, read_rows
from megatron_deepseek.finetuning.sample_values import VALUES, read_values, write_values
from megatron_deepseek.finetuning.splitting import split_by_reasoning
from megatron_deepseek.finetuning.summary import MOST_MESSAGES, Counts, Summary, read_summary

ROWS_PER_BATCH = 256
SAMPLED = 200  # conversations on which two libraries are compared
NO_LOSS = "nothing with loss"
EQUAL = "both answers are the same tokens"


@dataclass(frozen=True)
class Job:
    """What to tokenise and where: `overlong` and `longest` say what becomes of longer conversations.

    `convert` turns a row of the file of that number into its conversations; `split_turns` is none, or reasoning for a
    sample of each answer with thoughts. `has_values`: the conversations come with values. `ends_are_read`: the model
    reads a conversation's last token as well, which else is a label only; a label without loss follows it.
    """

    files: tuple[InputFile, ...]
    convert: Callable[[object, int], Group]
    encoder: Encoder
    tokenizer_model: str | None
    longest: int
    overlong: str
    split_turns: str
    max_bad_rows: int
    workers: int
    folder: Path
    has_values: bool = False
    ends_are_read: bool = False

    @property
    def prefix(self) -> str:
        return str(self.folder / "conversations")

    @property
    def endings(self) -> tuple[str, ...]:
        """Return the endings of the dataset's files, and of a part's."""
        return (".bin", ".idx", ".weights", *((VALUES,) if self.has_values else ()))


def tokenise(job: Job, say: Callable[[str], None]) -> Counts:
    """Return what became of the rows; make the dataset unless it is there, whole."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with _alone(job.folder / "lock", say):
        done = finished(job)
        if done is None:
            done = _put_together(job, make_parts(job, say))
            shutil.rmtree(job.folder / "parts", ignore_errors=True)
    refuse_bad_rows(done, job.max_bad_rows)
    return done


@contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a folder while the block runs; wait for another process that has it."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"waiting for another process that is tokenising into {path.parent}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def finished(job: Job) -> Counts | None:
    """Return the counts of the dataset that exists, None where there is none or its files are not whole."""
    try:
        written = json.loads((job.folder / "done.json").read_text())
        sizes = {suffix: os.path.getsize(job.prefix + suffix) for suffix in written["sizes"]}
        return Counts.of(written["counts"]) if sizes == written["sizes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse_bad_rows(counts: Counts, most: int):
    """Raise ValueError where more rows are bad than --max-bad-rows allows, with the first of them."""
    if counts.bad_rows > most:
        raise ValueError(f"{counts.bad[0]} ({counts.bad_rows} bad row{'s' * (counts.bad_rows > 1)} so far; "
                         f"--max-bad-rows {most} are skipped)")


def make_parts(job: Job, say: Callable[[str], None]) -> list[Summary]:
    folder, summaries = job.folder / "parts", {}
    folder.mkdir(exist_ok=True)
    job = replace(job, encoder=job.encoder.faster(_first_conversations(job), job.workers, job.tokenizer_model, say))
    progress = Progress(Counters(), sum(file.size for file in job.files), 1000, say)

    def work(part: Part) -> Summary:
        summary = read_summary(_base(folder, part.number) + ".json")
        if summary is None:
            summary = PartMaker(job, folder, part).make()
        progress.counters.add(_stored(job, part), summary.counts.samples, summary.counts.tokens)
        return summary

    bad = Counts()
    try:
        for summary in run_tasks(parts_of(list(job.files)), work, job.workers, progress.tick):
            summaries[summary.part] = summary
            bad = bad + summary.counts
            refuse_bad_rows(bad, job.max_bad_rows)
    finally:
        progress.close()
    return [summaries[number] for number in sorted(summaries)]


def _first_conversations(job: Job) -> Iterator[Conversation]:
    """Yield conversations from the beginning of the first part."""
    for part in itertools.islice(parts_of(list(job.files)), 1):
        for _, content in itertools.islice(read_rows(part, job.files[part.file]), SAMPLED):
            with suppress(BadRow):
                yield from job.convert(parse_line(content), part.file).conversations


def _stored(job: Job, part: Part) -> int:
    """Return the bytes of a part as they lie in its file; of a compressed one that is a guess."""
    file = job.files[part.file]
    return part.size if file.compression is None and part.group is None else min(part.size // 4, file.size)


def _base(folder: Path, number: int) -> str:
    return str(folder / f"{number:06d}")


class PartMaker:
    """Makes the files of one part."""

    def __init__(self, job: Job, folder: Path, part: Part):
        self.job, self.part, self.base = job, part, _base(folder, part.number)
        self.rows = self.trained = 0
        self.dropped, self.left_out, self.bad = Counter(), Counter(), []
        self.weights, self.values = WeightsWriter(), []

    def make(self) -> Summary:
        dtype = id_dtype(self.job.encoder.tokenizer.vocab_size)
        file = self.job.files[self.part.file]
        with written_whole([self.base], dtype) as (self.writer,):
            batch = []
            for line, content in read_rows(self.part, file):
                self.rows += 1
                try:
                    group = self.job.convert(parse_line(content), self.part.file)
                    batch += [(line, each) for each in self._split(group)]
                except BadRow as error:
                    self._refuse(line, error)
                if len(batch) >= ROWS_PER_BATCH:
                    self._add(batch)
                    batch = []
            self._add(batch)
            tokens = self.writer.num_tokens
        self.weights.write(self.base + ".weights")
        if self.job.has_values:
            write_values(self.base + VALUES, [np.array(self.values, np.float32)])
        counts = Counts(self.rows, len(self.weights.counts), tokens, self.trained, dict(self.dropped),
                        tuple(self.bad[:MOST_MESSAGES]), len(self.bad), dict(self.left_out))
        summary = Summary(self.part.number, counts, {suffix: os.path.getsize(self.base + suffix)
                                                     for suffix in self.job.endings})
        write_json(self.base + ".json", asdict(summary))
        return summary

    def _split(self, group: Group) -> list[Group]:
        if self.job.split_turns == "none":
            return [group]
        return [Group((each,)) for conversation in group.conversations for each in split_by_reasoning(conversation)]

    def _left_out(self, conversation: Conversation) -> dict[str, int]:
        """Return what is nowhere shown: where turns are split, each thought is in the sample of its own answer."""
        rules = self.job.encoder.rules
        return self.job.encoder.template.left_out(
            conversation, rules if self.job.split_turns == "none" else replace(rules, history_reasoning="keep"))

    def _refuse(self, line: int, error: BadRow):
        file = self.job.files[self.part.file]
        place = "row" if self.part.group is not None else "line"
        self.bad.append(f"{file.path} {place} {line}: {error}")
        self.dropped[error.reason] += 1

    def _add(self, batch: list[tuple[int, Group]]):
        all_encoded = iter(self.job.encoder.encode([each for _, group in batch for each in group.conversations]))
        for line, group in batch:
            found = list(itertools.islice(all_encoded, len(group.conversations)))
            bad = next((each for each in found if isinstance(each, BadRow)), None)
            if bad is not None:
                self._refuse(line, bad)
                continue
            kept = [self._fitted(line, *each) for each in zip(group.conversations, found)]
            reason = self._reason_to_drop(kept)
            if reason is not None:
                self.dropped[reason] += 1
            elif None not in kept:
                self._keep(group, kept)

    def _fitted(self, line: int, conversation: Conversation, encoded: Encoded) -> Encoded | None:
        """Return what fits of a conversation, None where it is too long and dropped."""
        too_long = len(encoded.ids) > self.job.longest
        return self._shorten(line, conversation, len(encoded.ids)) if too_long else encoded

    @staticmethod
    def _reason_to_drop(encoded: list[Encoded | None]) -> str | None:
        """Return why conversations that are encoded cannot be trained on, None if they can, or were dropped."""
        if None in encoded:
            return None
        if not all(each.trained for each in encoded):
            return NO_LOSS
        return EQUAL if len(encoded) > 1 and encoded[0].ids == encoded[1].ids else None

    def _keep(self, group: Group, encoded: list[Encoded]):
        for conversation, each in zip(group.conversations, encoded):
            if self.job.ends_are_read:
                each.add([self.job.encoder.tokenizer.eod], 0.0)
            self.trained += each.trained
            self.left_out.update(self._left_out(conversation))
            self.writer.add(np.array(each.ids), [[len(each.ids)]])
            self.weights.add(each.runs)
        self.values += group.values

    def _shorten(self, line: int, conversation: Conversation, length: int) -> Encoded | None:
        """Return what is left of an over-long conversation: its first turns, whole, or where not even these fit its
        first tokens; None if it is dropped.
        """
        longest = self.job.longest
        if self.job.overlong == "error":
            raise ValueError(f"{self.job.files[self.part.file].path} line {line}: the conversation has {length} "
                             f"tokens, more than --max-length {longest}; raise it, or give --overlong drop or truncate")
        if self.job.overlong == "drop":
            self.dropped[f"longer than --max-length {longest}"] += 1
            return None
        users = [index for index, turn in enumerate(conversation.turns) if turn.role == "user"]
        for end in reversed(users[1:]):
            shorter = Conversation(conversation.turns[:end], conversation.tools)
            (encoded,) = self.job.encoder.encode([shorter])
            if isinstance(encoded, Encoded) and len(encoded.ids) <= longest and encoded.trained:
                return encoded
        (encoded,) = self.job.encoder.encode([conversation])
        return encoded.cut(longest)


def _put_together(job: Job, summaries: list[Summary]) -> Counts:
    """Write the dataset of all parts, its loss weights, and last of all done.json."""
    (job.folder / "done.json").unlink(missing_ok=True)
    total = sum((summary.counts for summary in summaries), Counts())
    bases = [_base(job.folder / "parts", summary.part) for summary in summaries if summary.counts.samples]
    with written_whole([job.prefix], id_dtype(job.encoder.tokenizer.vocab_size)) as (writer,):
        for base in bases:
            _append(writer, base)
    counts = [LossWeights(base + ".weights").counts for base in bases]
    write_weights(job.prefix + ".weights", np.concatenate(counts or [np.empty(0, np.uint32)]),
                  (LossWeights(base + ".weights").runs for base in bases))
    if job.has_values:
        values = (read_values(base + VALUES, len(count)) for base, count in zip(bases, counts))
        write_values(job.prefix + VALUES, values)
    sizes = {suffix: os.path.getsize(job.prefix + suffix) for suffix in job.endings}
    write_json(str(job.folder / "done.json"), {"counts": asdict(total), "sizes": sizes})
    return total


def _append(writer: IndexedWriter, base: str):
    part = open_indexed(base, "part")
    writer.extend(np.asarray(part.ids))
    writer.end_documents([length] for length in part.lengths.tolist())
