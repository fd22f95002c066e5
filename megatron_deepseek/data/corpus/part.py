"""One part, from its segments to datasets of its own: read, filter, tokenise, write, and a summary that comes last.

A part is whole once `{number}.json` is there, which holds the checksums of the other files. Memory is a batch of about
a million characters, whatever the documents' size.
"""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b

import numpy as np

from megatron_deepseek.data.corpus.cutting import PIECE_CHARS, encode_pieces, slices
from megatron_deepseek.data.corpus.encoders import Encoder, check_ids
from megatron_deepseek.data.corpus.fim import Rearrangement, draw_rearrangement
from megatron_deepseek.data.corpus.long_text import BadDocument, LongText
from megatron_deepseek.data.corpus.plan import Part, Segment
from megatron_deepseek.data.corpus.records import Fault, Record, SegmentReader
from megatron_deepseek.data.corpus.settings import PreprocessSettings
from megatron_deepseek.data.indexed import IndexedWriter, written_whole

DOCUMENTS_PER_BATCH = 1024
CHARS_PER_BATCH = 1 << 19
MOST_TOKENS = np.iinfo(np.int32).max
RECORDS = np.dtype([("source", "<u4"), ("place", "<u8"), ("hash", "<u8", 2)])


class TooManyErrors(ValueError):
    """More documents cannot be used than --max-errors, or any under --on-error fail."""


@dataclass
class Summary:
    """What became of a part. `errors` are (segment, line in it, reason, detail); `checksums` CRC-32 by file ending."""

    part: int
    documents: int = 0
    tokens: int = 0
    chars: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[int, int, str, str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    checksums: dict[str, int] = field(default_factory=dict)
    input_checksum: int | None = None


def id_dtype(vocab_size: int) -> type:
    """Megatron's rule (DType.optimal_dtype)."""
    return np.uint16 if vocab_size < 65500 else np.int32


class PartMaker:
    """Makes parts of one run, in whichever process; `split` turns a text into sentences, or is None."""

    def __init__(self, settings: PreprocessSettings, encoder: Encoder, split: Callable[[str], list[str]] | None):
        self.settings, self.encoder, self.split = settings, encoder, split
        self.dtype = id_dtype(encoder.special.vocab_size)

    def make(self, part: Part, progress: Callable[[int, int, int], None]) -> Summary:
        """Write the part, and tell `progress` of stored bytes, documents and tokens. TooManyErrors; OSError."""
        summary = Summary(part.number, input_checksum=part.checksum)
        base = os.path.join(self.settings.parts_directory, part.name)
        with written_whole(self._prefixes(base), self.dtype) as writers:
            work = _PartInMaking(self, writers, summary, progress)
            for number, segment in enumerate(part.segments):
                work.add_segment(number, segment)
            if self.settings.selection.needs_records:
                np.concatenate(work.records or [np.empty(0, RECORDS)]).tofile(base + ".records")
        summary.checksums = {ending: checksum_of(base + ending) for ending in self.endings()}
        write_json(base + ".json", asdict(summary))
        return summary

    def _prefixes(self, base: str) -> list[str]:
        return [f"{base}_{key}" for key in self.settings.content.json_keys]

    def endings(self) -> list[str]:
        """Of the files that make up a part."""
        keys = self.settings.content.json_keys
        records = [".records"] if self.settings.selection.needs_records else []
        return [f"_{key}{suffix}" for key in keys for suffix in (".bin", ".idx")] + records


class _PartInMaking:
    """The documents gathered for the next batch, and where they go."""

    def __init__(self, maker: PartMaker, writers: list[IndexedWriter], summary: Summary, progress):
        self.maker, self.writers, self.summary, self.progress = maker, writers, summary, progress
        self.content, self.special = maker.settings.content, maker.encoder.special
        self.records: list[np.ndarray] = []
        self.batch: list[Record] = []
        self.batch_chars = self.reported = 0

    def add_segment(self, number: int, segment: Segment):
        content, settings = self.content, self.maker.settings
        self.number, self.segment, self.reported = number, segment, 0
        reader = SegmentReader(segment, content.json_keys, content.text_unit, settings.parts_directory)
        for record in reader:
            if isinstance(record, Fault):
                self._flush()
                self._count_error(record)
            else:
                self._add(record)
        self._flush()
        self.summary.lines.append(reader.lines)
        if reader.blank_lines:
            self._note("blank lines, not counted as documents", reader.blank_lines)
        self._report(segment.size, 0, 0)

    def _add(self, record: Record):
        chars = sum(map(_chars_held, record.texts))
        if chars > PIECE_CHARS:
            self._flush()
            self._add_long(record)
            return
        why = self._why_unwanted(chars)
        if why is not None:
            self.summary.skipped[why] = self.summary.skipped.get(why, 0) + 1
            return
        self.batch.append(record)
        self.batch_chars += chars
        if len(self.batch) == DOCUMENTS_PER_BATCH or self.batch_chars >= CHARS_PER_BATCH:
            self._flush()

    def _why_unwanted(self, chars: int) -> str | None:
        if chars < self.content.min_chars:
            return f"shorter than --min-chars {self.content.min_chars}"
        if self.content.max_chars is not None and chars > self.content.max_chars:
            return f"longer than --max-chars {self.content.max_chars}"
        return None

    def _flush(self):
        records, chars = self.batch, self.batch_chars
        if not records:
            return
        self.batch, self.batch_chars = [], 0
        self._write(records)
        self.summary.chars += chars
        self._report(self._stored_bytes(records[-1].place), 0, 0)

    def _write(self, records: list[Record]):
        """All at once; where that fails, one by one, to name those at fault."""
        try:
            encoded = [self._encode_key([record.texts[key] for record in records], records)
                       for key in range(len(self.writers))]
        except ValueError as error:
            if len(records) > 1:
                for record in records:
                    self._write([record])
            else:
                self._count_error(_fault_of(records[0], error))
            return
        for writer, (ids, lengths) in zip(self.writers, encoded, strict=True):
            writer.add(ids, lengths)
        self._count(records, sum(len(ids) for ids, _ in encoded))

    def _encode_key(self, values: list, records: list[Record]) -> tuple[np.ndarray, list[list[int]]]:
        """The ids of all sequences end to end, and each document's sequence lengths: none in an empty document."""
        arrangements = [self._arrangement(value, record) for value, record in zip(values, records, strict=True)]
        texts = [self._sequences_of(value, arrangement) for value, arrangement in zip(values, arrangements)]
        encoded = self.maker.encoder.encode_batch([text for document in texts for text in document])
        arrays, lengths, place = [], [], 0
        for document, arrangement in zip(texts, arrangements):
            sequences = encoded[place:place + len(document)]
            place += len(document)
            if arrangement is not None:
                sequences = [arrangement.join(sequences, self.special.fim)]
            own = self._with_ends([sequence for sequence in sequences if len(sequence)])
            arrays.extend(own)
            lengths.append([len(sequence) for sequence in own])
        ids = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        check_ids(ids, self.special.vocab_size)
        return ids, lengths

    def _arrangement(self, value, record: Record) -> Rearrangement | None:
        content = self.content
        if not content.fim_rate or not isinstance(value, str) or not value:
            return None
        return draw_rearrangement(content.seed, content.fim_rate, content.fim_spm_rate, self.segment.source.index,
                                  record.place)

    def _sequences_of(self, value, arrangement: Rearrangement | None) -> list[str]:
        if arrangement is not None:
            return arrangement.cut(value)
        if isinstance(value, list):
            return value
        return [value] if self.maker.split is None else self.maker.split(value)

    def _with_ends(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """BOS before the first and EOD after the last, in a document that has any."""
        if sequences and self.content.append_bos:
            sequences[0] = np.concatenate([[self.special.bos], sequences[0]])
        if sequences and self.content.append_eod:
            sequences[-1] = np.concatenate([sequences[-1], [self.special.eod]])
        return sequences

    def _count(self, records: list[Record], tokens: int):
        summary = self.summary
        summary.documents += len(records)
        summary.tokens += tokens
        for record in records:
            empty = not any(map(_chars_held, record.texts))
            if empty:
                self._note("empty, kept as documents without tokens")
            if any("\0" in text for value in record.texts for text in _strings(value)):
                self._note("with NUL characters, kept")
        if self.maker.settings.selection.needs_records:
            rows = np.empty(len(records), RECORDS)
            rows["source"], rows["place"] = self.segment.source.index, [record.place for record in records]
            if self.maker.settings.selection.dedup is not None:
                rows["hash"] = [hash_of(record.texts) for record in records]
            self.records.append(rows)
        self.progress(0, len(records), tokens)

    def _note(self, what: str, count: int = 1):
        self.summary.notes[what] = self.summary.notes.get(what, 0) + count

    def _add_long(self, record: Record):
        """A document whose ids are written as they come, and taken back where it turns out to be unfit."""
        marks = [writer.num_tokens for writer in self.writers]
        try:
            chars = sum(len(piece) for value in record.texts for piece in _pieces(value))
            why = self._why_unwanted(chars)
            if why is not None:
                self.summary.skipped[why] = self.summary.skipped.get(why, 0) + 1
                return
            lengths = [self._write_long(writer, value) for writer, value in zip(self.writers, record.texts)]
        except ValueError as error:
            for writer, mark in zip(self.writers, marks):
                writer.rewind(mark)
            self._count_error(_fault_of(record, error))
            return
        for writer, own in zip(self.writers, lengths):
            writer.end_documents([own])
        if self.content.fim_rate:
            self._note(f"longer than {PIECE_CHARS} characters, left as they are by --fim-rate")
        self.summary.chars += chars
        self._count([record], sum(map(sum, lengths)))

    def _write_long(self, writer: IndexedWriter, value) -> list[int]:
        """The lengths of the sequences written."""
        lengths, begun = [], not self.content.append_bos
        for sequence in self._long_sequences(value):
            length = 0
            for ids in encode_pieces(self.maker.encoder, sequence):
                check_ids(ids, self.special.vocab_size)
                if len(ids) and not begun:
                    ids, begun = np.concatenate([[self.special.bos], ids]), True
                writer.extend(ids)
                length += len(ids)
            lengths += [length] if length else []
            if length >= MOST_TOKENS:
                raise BadDocument("too large", f"a sequence of {length} tokens, which no index can hold")
        if lengths and self.content.append_eod:
            writer.extend(np.array([self.special.eod]))
            lengths[-1] += 1
        return lengths

    def _long_sequences(self, value):
        """Each sequence of the document as an iterable of pieces."""
        if isinstance(value, list):
            return (slices(text) for text in value)
        if self.maker.split is None:
            return (_pieces(value),)
        return ([sentence] for piece in _rejoined(_pieces(value)) for sentence in self.maker.split(piece))

    def _count_error(self, fault: Fault):
        summary, execution = self.summary, self.maker.settings.execution
        summary.skipped[fault.reason] = summary.skipped.get(fault.reason, 0) + 1
        summary.errors.append((self.number, fault.line, fault.reason, fault.detail))
        if execution.on_error == "fail":
            raise TooManyErrors(f"{where(self.segment, fault.line)}: {fault.detail}")
        if len(summary.errors) > execution.max_errors:
            raise TooManyErrors(f"more than --max-errors {execution.max_errors} documents cannot be used; the last of "
                                f"them is {where(self.segment, fault.line)}: {fault.detail}")

    def _stored_bytes(self, place: int) -> int:
        """Estimated from the place of the last record, where places are bytes and the segment's end is known."""
        segment = self.segment
        if segment.end is None or segment.source.format == "parquet":
            return 0
        return segment.size * (place - segment.start) // max(1, segment.end - segment.start)

    def _report(self, stored: int, documents: int, tokens: int):
        stored = max(self.reported, min(stored, self.segment.size))
        self.progress(stored - self.reported, documents, tokens)
        self.reported = stored


def _fault_of(record: Record, error: ValueError) -> Fault:
    reason = error.reason if isinstance(error, BadDocument) else _words_of(type(error).__name__)
    return Fault(record.place, record.line, reason, str(error))


def _words_of(name: str) -> str:
    return {"IdOutsideVocabulary": "id outside the vocabulary"}.get(name, "cannot be tokenised")


def _chars_held(value) -> int:
    """The characters of a value; of a long text more than any batch takes."""
    if isinstance(value, LongText):
        return PIECE_CHARS + 1
    return len(value) if isinstance(value, str) else sum(map(len, value))


def _strings(value) -> list[str]:
    return [value] if isinstance(value, str) else value if isinstance(value, list) else []


def _pieces(value):
    """A value as strings of bounded size, whichever form it has."""
    if isinstance(value, LongText):
        return value.pieces()
    return (piece for text in _strings(value) for piece in slices(text))


def _rejoined(pieces, size: int = 1_000_000):
    """The same text in pieces of `size` characters, where Megatron-LM cuts long texts before it splits sentences."""
    held = ""
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    yield held


def hash_of(texts: tuple) -> tuple[int, int]:
    """128 bits of the document's texts, with the borders between them."""
    digest = blake2b(digest_size=16)
    for value in texts:
        for text in value if isinstance(value, list) else [value]:
            size = 0
            for piece in _pieces(text):
                content = piece.encode()
                digest.update(content)
                size += len(content)
            digest.update(size.to_bytes(8, "little") + b"\xff")
        digest.update(b"\xfe")
    value = int.from_bytes(digest.digest(), "little")
    return value >> 64, value & (1 << 64) - 1


def where(segment: Segment, line: int, lines_before: int | None = None) -> str:
    """The file and the line (counting from 1) or row of a record; lines that nobody counted are counted now."""
    if segment.source.format == "parquet":
        return f"{segment.source.path} row {line}" + ("" if segment.start == 0 else
                                                      f" after row group {segment.start - 1}")
    before = segment.lines_before if lines_before is None else lines_before
    if before is None:
        before = count_lines(segment.source.path, segment.start)
    return f"{segment.source.path} line {before + line}"


def count_lines(path: str, end: int) -> int:
    """Line ends before byte `end`."""
    count = 0
    with open(path, "rb") as file:
        while end > 0:
            block = file.read(min(end, 1 << 20))
            count, end = count + block.count(b"\n"), end - len(block) if block else 0
    return count


def checksum_of(path: str) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def write_json(path: str, value):
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
    os.replace(path + ".tmp", path)
