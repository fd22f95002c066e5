"""One part of the input to datasets of its own: read, filter, tokenise, write, and a summary that comes last.

A part is whole once `{number}.json` exists, which holds the checksums of the other files. It takes the memory of a
batch of about a million characters, whatever the size of the documents.
"""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megatron_deepseek.data.indexed import IndexedWriter, written_whole
from megatron_deepseek.data.naming import naming
from megatron_deepseek.data.preprocess.cutting import PIECE_CHARS
from megatron_deepseek.data.preprocess.documents import DocumentEncoder
from megatron_deepseek.data.preprocess.files import checksum_of, write_json
from megatron_deepseek.data.preprocess.long_text import BadDocument
from megatron_deepseek.data.preprocess.plan import Part, Segment
from megatron_deepseek.data.preprocess.records import DAMAGED, Fault, Record, SegmentReader, is_cut, where
from megatron_deepseek.data.preprocess.settings import PreprocessSettings
from megatron_deepseek.data.preprocess.texts import chars_held, hash_of, pieces, strings
from megatron_deepseek.data.tokenizer import IdOutsideVocabulary
from megatron_deepseek.foreign_json import LARGEST_LIST, read_object

DOCUMENTS_PER_BATCH = 1024
CHARS_PER_BATCH = 1 << 19
RECORDS = np.dtype([("file", "<u4"), ("place", "<u8"), ("hash", "<u8", 2)])

Progress = Callable[[int, int, int], None]


class TooManyErrors(ValueError):
    """Raised where more documents than --max-errors cannot be used, or one under --on-error fail."""


class UnreadableInput(ValueError):
    """Raised where a file cannot be read to its end, and --allow-damaged-files is 0."""


@dataclass
class Summary:
    """The counts and faults of a finished part.

    `errors` are (segment, line in it, reason, detail) of documents that cannot be used; `damage` has (segment, line,
    detail) of files that cannot be read to their end. `lines` are the lines of each segment, `taken` its documents that
    were used. `checksums` has the CRC-32 of the part's files by their endings.
    """

    part: int
    documents: int = 0
    tokens: int = 0
    chars: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[int, int, str, str]] = field(default_factory=list)
    damage: list[tuple[int, int, str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    checksums: dict[str, int] = field(default_factory=dict)
    input_checksum: int | None = None


def read_summary(path: Path) -> Summary:
    """Return the summary in a file. Raise ValueError where it is not as it was written."""
    written = dict(read_object(path, LARGEST_LIST).fields)
    if written.pop("digest", None) != _digest(written):
        raise ValueError(f"{path} is damaged")
    return Summary(**written)


def _digest(summary: dict) -> int:
    return zlib.crc32(json.dumps(summary, sort_keys=True).encode())


def id_dtype(vocab_size: int) -> type:
    """Return the type of ids by Megatron's rule (DType.optimal_dtype)."""
    return np.uint16 if vocab_size < 65500 else np.int32


class PartMaker:
    """Makes parts of one run, in whichever process."""

    def __init__(self, settings: PreprocessSettings, encoder: DocumentEncoder):
        self.settings, self.encoder = settings, encoder
        self.dtype = id_dtype(encoder.special.vocab_size)

    def make(self, part: Part, progress: Progress) -> Summary:
        """Write the part and return its summary; `progress` is called with stored bytes, documents and tokens.

        Raise TooManyErrors, UnreadableInput, or OSError where there is no room.
        """
        summary = Summary(part.number, input_checksum=part.checksum)
        base = os.path.join(self.settings.parts_directory, part.name)
        with written_whole([f"{base}_{key}" for key in self.settings.content.json_keys], self.dtype) as writers:
            work = _PartInMaking(self, writers, summary, progress)
            for number, segment in enumerate(part.segments):
                work.add_segment(number, segment)
            if self.settings.selection.needs_records:
                with naming(base + ".records"):
                    Path(base + ".records").write_bytes(np.concatenate([np.empty(0, RECORDS), *work.records]).tobytes())
        summary.checksums = {ending: checksum_of(base + ending) for ending in self.endings()}
        write_json(base + ".json", asdict(summary) | {"digest": _digest(asdict(summary))})
        return summary

    def endings(self) -> list[str]:
        """Return the endings of the files that make up a part."""
        keys = self.settings.content.json_keys
        records = [".records"] if self.settings.selection.needs_records else []
        return [f"_{key}{suffix}" for key in keys for suffix in (".bin", ".idx")] + records


class _PartInMaking:
    """A part while it is made: the documents gathered for the next batch, and the writers that take them."""

    def __init__(self, maker: PartMaker, writers: list[IndexedWriter], summary: Summary, progress: Progress):
        self.settings, self.encoder = maker.settings, maker.encoder
        self.writers, self.summary, self.progress = writers, summary, progress
        self.records: list[np.ndarray] = []
        self.batch: list[Record] = []
        self.batch_chars = self.reported = 0

    def add_segment(self, number: int, segment: Segment):
        self.number, self.segment, self.reported = number, segment, 0
        content = self.settings.content
        self.summary.taken.append(0)
        reader = SegmentReader(segment, content.json_keys, content.text_unit, self.settings.parts_directory)
        for record in reader:
            if isinstance(record, Fault):
                self._flush()
                self._count_fault(record)
            else:
                self._add(record)
        self._flush()
        self.summary.lines.append(reader.lines)
        self._note("blank lines, not counted as documents", reader.blank_lines)
        self._report(segment.size)

    def _add(self, record: Record):
        chars = sum(map(chars_held, record.texts))
        if chars > PIECE_CHARS:
            self._flush()
            self._add_long(record)
        elif not self._is_unwanted(chars):
            self.batch.append(record)
            self.batch_chars += chars
            if len(self.batch) == DOCUMENTS_PER_BATCH or self.batch_chars >= CHARS_PER_BATCH:
                self._flush()

    def _is_unwanted(self, chars: int) -> bool:
        """Return whether the length is out of bounds, and count it if so."""
        content, skipped = self.settings.content, self.summary.skipped
        if chars < content.min_chars:
            why = f"shorter than --min-chars {content.min_chars}"
        elif content.max_chars is not None and chars > content.max_chars:
            why = f"longer than --max-chars {content.max_chars}"
        else:
            return False
        skipped[why] = skipped.get(why, 0) + 1
        return True

    def _flush(self):
        records = self.batch
        if records:
            self.batch, self.batch_chars = [], 0
            self._write(records)
            self._report(self._stored_bytes(records[-1].place))

    def _write(self, records: list[Record]):
        """Encode and write all records at once or, where that fails, one by one, to find those at fault."""
        places, file_number = [record.place for record in records], self.segment.input_file.index
        try:
            encoded = [self.encoder.encode(list(texts), file_number, places)
                       for texts in zip(*(record.texts for record in records), strict=True)]
        except ValueError as error:
            if len(records) > 1:
                for record in records:
                    self._write([record])
            else:
                self._count_fault(_fault_of(records[0], error))
            return
        for writer, (ids, lengths) in zip(self.writers, encoded, strict=True):
            writer.add(ids, lengths)
        self._count(records, sum(len(ids) for ids, _ in encoded),
                    sum(chars_held(text) for record in records for text in record.texts))

    def _add_long(self, record: Record):
        """Write a document's ids as they come, and take them back where it turns out that it cannot be used."""
        marks = [writer.num_tokens for writer in self.writers]
        try:
            chars = sum(len(piece) for text in record.texts for piece in pieces(text))
            if self._is_unwanted(chars):
                return
            lengths = [self.encoder.encode_long(text, writer.extend)
                       for writer, text in zip(self.writers, record.texts, strict=True)]
        except ValueError as error:
            for writer, mark in zip(self.writers, marks):
                writer.rewind(mark)
            self._count_fault(self._fault_of_long(record, error))
            return
        for writer, own in zip(self.writers, lengths):
            writer.end_documents([own])
        self._note(f"longer than {PIECE_CHARS} characters, left as they are by --fim-rate",
                   int(self.settings.content.fim_rate > 0))
        self._count([record], sum(map(sum, lengths)), chars)

    def _count(self, records: list[Record], tokens: int, chars: int):
        self.summary.documents += len(records)
        self.summary.taken[-1] += len(records)
        self.summary.tokens += tokens
        self.summary.chars += chars
        self._note("empty, kept as documents without tokens",
                   sum(not any(map(chars_held, record.texts)) for record in records))
        self._note("with NUL characters, kept", sum(
            any("\0" in string for text in record.texts for string in strings(text)) for record in records))
        if self.settings.selection.needs_records:
            self.records.append(self._records_of(records))
        self.progress(0, len(records), tokens)

    def _records_of(self, records: list[Record]) -> np.ndarray:
        """Return the rows that the selection needs, one for each document: its place and its hash."""
        rows = np.zeros(len(records), RECORDS)
        rows["file"], rows["place"] = self.segment.input_file.index, [record.place for record in records]
        if self.settings.selection.dedup is not None:
            rows["hash"] = [hash_of(record.texts) for record in records]
        return rows

    def _note(self, what: str, count: int):
        if count:
            self.summary.notes[what] = self.summary.notes.get(what, 0) + count

    def _count_fault(self, fault: Fault):
        if fault.reason == DAMAGED:
            self._count_damage(fault)
        else:
            self._count_error(fault)

    def _count_damage(self, fault: Fault):
        if not self.settings.execution.allow_damaged_files:
            raise UnreadableInput(f"{where(self.segment, fault.line)}: {fault.detail}. --allow-damaged-files 1 would "
                                  f"take what comes before, of one such file")
        self.summary.damage.append((self.number, fault.line, fault.detail))

    def _count_error(self, fault: Fault):
        summary, execution = self.summary, self.settings.execution
        summary.skipped[fault.reason] = summary.skipped.get(fault.reason, 0) + 1
        summary.errors.append((self.number, fault.line, fault.reason, fault.detail))
        if execution.on_error == "fail":
            raise TooManyErrors(f"{where(self.segment, fault.line)}: {fault.detail}")
        if len(summary.errors) > execution.max_errors:
            raise TooManyErrors(f"more than --max-errors {execution.max_errors} documents cannot be used; the last of "
                                f"them is {where(self.segment, fault.line)}: {fault.detail}")

    def _fault_of_long(self, record: Record, error: ValueError) -> Fault:
        """Return the fault of a long document. Plain text, decoded while it is tokenised, shows a cut only then."""
        if self.segment.input_file.format == "text" and isinstance(error, BadDocument) and is_cut(error, "text"):
            return Fault(record.place, record.line, DAMAGED, f"the file breaks off within its last line: {error}")
        return _fault_of(record, error)

    def _stored_bytes(self, place: int) -> int:
        """Return an estimate of the stored bytes up to a record; 0 where its place is no byte or the end is unknown."""
        segment = self.segment
        if segment.end is None or segment.input_file.format == "parquet":
            return 0
        return segment.size * (place - segment.start) // max(1, segment.end - segment.start)

    def _report(self, stored: int):
        stored = max(self.reported, min(stored, self.segment.size))
        self.progress(stored - self.reported, 0, 0)
        self.reported = stored


def _fault_of(record: Record, error: ValueError) -> Fault:
    reason = (error.reason if isinstance(error, BadDocument) else
              "id outside the vocabulary" if isinstance(error, IdOutsideVocabulary) else "cannot be tokenised")
    return Fault(record.place, record.line, reason, str(error))
