"""The readers of .idx on random and hostile files: either all is well, or a ValueError names the file.

"Well" is decided by an oracle that reads the whole file with numpy. Memory is bounded by fixed chunks, however large
the counts and lengths that a file claims.
"""

import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_deepseek.data.index_file import HEADER, MAGIC, TOKEN_DTYPES, index_damage, open_index
from megatron_deepseek.data.indexed import open_indexed, token_range
from megatron_deepseek.data.inspection import measure, read_documents, verify
from megatron_deepseek.data.merge import merge_datasets, split_dataset

FUZZ = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture],
                derandomize=True)
MOST_MEMORY = 48 << 20

COUNTS = st.sampled_from([0, 1, 2, 3, 2**31 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
ENTRIES = st.sampled_from([-2**63, -2**31, -2, -1, 0, 1, 2, 3, 4, 8, 2**31 - 1, 2**62, 2**63 - 8, 2**63 - 1])
ANYTHING = st.binary(max_size=99) | st.binary(max_size=99).map(lambda tail: MAGIC + tail)


@st.composite
def sound(draw):
    """(.bin, .idx) of up to 5 documents."""
    documents = draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=draw(st.integers(0, 3)), max_size=5))
    code = draw(st.sampled_from(sorted(TOKEN_DTYPES)))
    lengths = np.array(sum(documents, []), "<i4")
    itemsize = np.dtype(TOKEN_DTYPES[code]).itemsize
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * itemsize
    entries = np.cumsum([0, *map(len, documents)], dtype="<i8")
    modes = np.zeros(len(lengths) if draw(st.booleans()) else 0, "i1")
    index = b"".join([HEADER.pack(MAGIC, 1, code, len(lengths), len(entries)), lengths.tobytes(), pointers.tobytes(),
                      entries.tobytes(), modes.tobytes()])
    size = int(lengths.sum()) * itemsize
    return draw(st.binary(min_size=size, max_size=size)), index


@st.composite
def hostile(draw):
    """A sound pair in which one or two entries of the sections are others, or one count of the header is."""
    data, index = draw(sound())
    _, _, code, sequences, documents = HEADER.unpack(index[:HEADER.size])
    entries = [*np.frombuffer(index, "<i4", sequences, HEADER.size).tolist(),
               *np.frombuffer(index, "<i8", sequences + documents, HEADER.size + 4 * sequences).tolist()]
    modes = index[HEADER.size + 12 * sequences + 8 * documents:]
    for _ in range(draw(st.integers(0, 2))):
        entries[draw(st.integers(0, len(entries) - 1))] = draw(ENTRIES)
    counts = [sequences, documents]
    if draw(st.sampled_from([False, False, True])):
        counts[draw(st.integers(0, 1))] = draw(COUNTS)
    if counts[1] == 0:
        del entries[2 * sequences:]
    header = HEADER.pack(MAGIC, draw(st.sampled_from([1] * 9 + [2**64 - 1])), code, *counts)
    lengths = np.clip(np.array(entries[:sequences], object), -2**31, 2**31 - 1).astype("<i4")
    return data, header + lengths.tobytes() + np.array(entries[sequences:], "<i8").tobytes() + modes


@st.composite
def damaged(draw):
    """A sound pair with some bytes overwritten, or either file cut or continued."""
    files = [bytearray(part) for part in draw(sound())]
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(files))
        at = draw(st.integers(0, len(part)))
        kind = draw(st.sampled_from(["cut", "write", "write", "append"]))
        if kind == "cut":
            del part[at:]
        elif kind == "write":
            patch = draw(st.binary(min_size=1, max_size=8))[:len(part) - at]
            part[at:at + len(patch)] = patch
        else:
            part += draw(st.binary(min_size=1, max_size=20))
    return bytes(files[0]), bytes(files[1])


def write(folder, files) -> str:
    for suffix, data in zip((".bin", ".idx"), files):
        (folder / f"data{suffix}").write_bytes(data)
    return str(folder / "data")


def is_sound(bin_data: bytes, idx: bytes) -> bool:
    """The same question, asked by reading all at once; for files whose header is known to be well."""
    _, _, code, sequences, entries = HEADER.unpack(idx[:HEADER.size])
    lengths = np.frombuffer(idx, "<i4", sequences, HEADER.size).astype(object)
    pointers = np.frombuffer(idx, "<i8", sequences, HEADER.size + 4 * sequences).astype(object)
    documents = np.frombuffer(idx, "<i8", entries, HEADER.size + 12 * sequences).tolist()
    modes = np.frombuffer(idx, "i1", -1, HEADER.size + 12 * sequences + 8 * entries)
    ends = [0, *np.cumsum(lengths * np.dtype(TOKEN_DTYPES[code]).itemsize)]
    return (all(length >= 0 for length in lengths) and list(pointers) == ends[:-1] and ends[-1] == len(bin_data)
            and documents == sorted(documents) and documents[0] == 0 and documents[-1] == sequences
            and (modes >= 0).all())


def refusal(call, *arguments):
    """The message of its ValueError, which names the file; None where it had nothing to say."""
    try:
        call(*arguments)
    except ValueError as error:
        assert "data" in str(error) and (".idx" in str(error) or "no sequences" in str(error)
                                         or "documents: part " in str(error)), error
        return str(error)
    return None


def read_all(prefix: str):
    """As training does: every sequence where the .idx says it is."""
    file = open_indexed(prefix, "--data-path")
    token_range(file)
    index = open_index(prefix, "--data-path")
    for length, pointer in zip(file.lengths.tolist(), index.map(index.pointers).tolist()):
        end = pointer + length * index.token_dtype.itemsize
        assert 0 <= pointer <= end <= os.path.getsize(prefix + ".bin")


def read_document(index, number: int):
    document, = read_documents(index, number, 1, 4)
    assert len(document.ids) == min(4, document.length) and document.num_sequences >= 0


@FUZZ
@given(files=st.integers(0, 9).flatmap(lambda kind: hostile() if kind < 6 else damaged() if kind < 8 else
                                       sound() if kind == 8 else st.tuples(st.binary(max_size=9), ANYTHING)))
def test_readers_refuse_or_read(tmp_path, files):
    prefix = write(tmp_path, files)
    tracemalloc.start()
    try:
        refusal(read_all, prefix)
        if refusal(open_index, prefix, "dataset") is not None:
            assert refusal(open_indexed, prefix, "--data-path") is not None
            return
        index = open_index(prefix, "dataset")
        damage = list(index_damage(index))
        assert all(prefix in line for line in damage)
        assert (not damage) == is_sound(*files), damage
        for call, *arguments in ((measure, index), (merge_datasets, [prefix], prefix + "_merged")):
            assert (refusal(call, *arguments) is None) == (not damage)
        assert damage[:2] == list(verify(index, None, 2).damage)[:2] or not damage
        refusal(split_dataset, prefix, prefix + "_part", [1.0, 1.0])
        for number in range(index.num_document_entries - 1):
            refusal(read_document, index, number)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MEMORY, peak
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("strategy", [sound(), hostile(), damaged()], ids=["sound", "hostile", "damaged"])
def test_the_strategies_reach_behind_the_header(tmp_path, strategy):
    """A fuzz that is always refused at the first byte would prove nothing."""
    reached = []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(files=strategy)
    def count(files):
        reached.append(refusal(open_index, write(tmp_path, files), "dataset") is None)
    count()
    assert sum(reached) >= 12
