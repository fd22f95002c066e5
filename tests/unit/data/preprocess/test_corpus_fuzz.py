"""Readers on arbitrary bytes: every record or its fault, no crash, no hang, and of sound input every text."""

import gzip
import json
import lzma
import mmap
import resource
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deepseek.data.preprocess import long_text, records
from megatron_deepseek.data.preprocess.inputs import InputFile
from megatron_deepseek.data.preprocess.plan import Segment, plan_parts
from megatron_deepseek.data.preprocess.records import Fault, SegmentReader
from megatron_deepseek.data.preprocess.streams import DamagedStream, open_stream

FEW = settings(max_examples=60, deadline=None)
JSON_LIKE = st.lists(st.sampled_from([b'{"text": "', b'"}', b"\n", b'"', b"\\", b"\\u", b"d83d", b"\\ude00", b"{", b"[",
                                      b"\xff", b"\0", b"\xe4\xb8\xad", b"abc", b'{"text": "a b"}\n', b": "]),
                     max_size=40)


def mapped(content: bytes) -> mmap.mmap:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@FEW
@given(content=JSON_LIKE.map(b"".join), part_bytes=st.integers(1, 60), long=st.sampled_from([8, 1 << 23]))
def test_every_line_is_a_record_or_a_fault(content, part_bytes, long):
    """In parts of any size, lines held or mapped: the records are those that json alone finds, the rest are faults."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "LONG_LINE_BYTES", long)
        path = Path(folder, "in.jsonl")
        path.write_bytes(content)
        source = InputFile(0, str(path), "jsonl", None, len(content), 0)
        found = [record for part in plan_parts([source], part_bytes, "file", lambda number: None)
                 for segment in part.segments for record in SegmentReader(segment, ("text",), "file", folder)]
    lines = [line for line in content.split(b"\n") if line.strip()]
    assert len(found) == len(lines)
    for record, line in zip(found, lines):
        expected = text_by_json(line)
        assert isinstance(record, Fault) if expected is None else record.texts == (expected,)


def text_by_json(line: bytes):
    """The reference: None where the line is unfit."""
    try:
        document = json.loads(line.decode())
        value = document["text"]
        value.encode()
        return value
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


@FEW
@given(text=st.text(max_size=60) | st.text("😀\U0001d518\\\"\nué中d8", min_size=20, max_size=60)
       | JSON_LIKE.map(lambda parts: b"".join(parts).decode(errors="replace")),
       ascii_json=st.booleans(), piece=st.integers(13, 30))
def test_long_strings_in_pieces_join_to_the_text(text, ascii_json, piece):
    line = json.dumps({"a": [1, {"b": "x"}], "text": text, "z": "short"}, ensure_ascii=ascii_json).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "LONG_STRING_BYTES", 5)
        patch.setattr(long_text, "PIECE_BYTES", piece)
        value = long_text.parse_long_line(mapped(line))["text"]
        assert (value if isinstance(value, str) else "".join(value.pieces())) == text


@FEW
@given(content=st.binary(min_size=1, max_size=60) | st.text("aé中😀", min_size=10, max_size=30).map(str.encode),
       piece=st.integers(4, 20))
def test_plain_text_in_pieces(content, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "PIECE_BYTES", piece)
        try:
            joined = "".join(long_text.plain_text(mapped(content)).pieces())
        except long_text.BadDocument:
            joined = None
    try:
        expected = content.decode()
    except UnicodeDecodeError:
        expected = None
    assert joined == expected


def compress(name: str, content: bytes) -> bytes:
    if name == "zstd":
        return pytest.importorskip("zstandard").compress(content)
    return gzip.compress(content) if name == "gzip" else lzma.compress(content)


@FEW
@given(name=st.sampled_from(["gzip", "xz", "zstd"]), lines=st.integers(0, 50), data=st.data())
def test_damaged_streams_end_in_damage(name, lines, data):
    """Cut, changed or garbage: a part of the content and DamagedStream, or all of the content."""
    content = b"".join(b"%d some text\n" % line for line in range(lines))
    stored = bytearray(compress(name, content) + data.draw(st.sampled_from([b"", compress(name, content)])))
    kind = data.draw(st.sampled_from(["whole", "cut", "changed", "garbage"]))
    if kind == "cut":
        del stored[data.draw(st.integers(0, len(stored) - 1)):]
    elif kind == "changed":
        stored[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "garbage":
        stored = bytearray(data.draw(st.binary(max_size=50)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stream")
        path.write_bytes(stored)
        received = b""
        with open_stream(str(path), name) as stream:
            try:
                while block := stream.read1(1 << 16):
                    received += block
                damaged = False
            except DamagedStream as error:
                damaged = True
                assert "\n" not in str(error)
    if kind == "whole":
        assert not damaged and received in (content, content * 2)
    elif kind == "cut":
        assert damaged or received in (content, content * 2, b"")
        assert (content * 2).startswith(received)


def test_a_claimed_dictionary_is_filled_only_as_far_as_the_text_goes(folder):
    """An .xz whose header asks for 3 GB is read, in the memory that its text needs."""
    stored = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}])
    content = bytearray(stored.compress(b"text\n") + stored.flush())
    assert content[12:16] == b"\x02\x00\x21\x01"  # the block header: its size, flags, LZMA2, one byte of properties
    content[16] = 39  # 3 GB
    content[20:24] = zlib.crc32(bytes(content[12:20])).to_bytes(4, "little")
    path = folder / "in.xz"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_stream(str(path), "xz") as stream:
        assert stream.read() == b"text\n"
    del stream  # and with it what the decompressor has reserved
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limit[1]))
    try:
        with (open_stream(str(path), "xz") as stream,
              pytest.raises(ValueError, match="in.xz: no memory for the window") as why):
            stream.read()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert not isinstance(why.value, DamagedStream)


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1garbagePAR1", b""])
def test_damaged_parquet_is_a_fault(folder, content):
    pytest.importorskip("pyarrow")
    path = folder / "in.parquet"
    path.write_bytes(content)
    source = InputFile(0, str(path), "parquet", None, len(content), 0)
    fault, = SegmentReader(Segment(source), ("text",), "file", str(folder))
    assert fault.reason == "damaged file"
