"""Merging datasets: the bytes of megatron-core's add_index; every way of copying; what is refused, and what is left."""

import os

import numpy as np
import pytest

from megatron_deepseek.data import index_file, merge
from megatron_deepseek.data.index_file import open_index
from megatron_deepseek.data.indexed import IndexedWriter
from megatron_deepseek.data.merge import merge_datasets


def write_dataset(prefix, documents, dtype="<u2"):
    """`documents`: for each the lengths of its sequences. Ids are drawn."""
    writer = IndexedWriter(str(prefix), dtype)
    tokens = sum(map(sum, documents))
    writer.add(np.random.default_rng(tokens).integers(0, 1000, tokens).astype(dtype), documents)
    writer.finish()
    writer.publish()
    return str(prefix)


def contents(prefix):
    return tuple(open(f"{prefix}{suffix}", "rb").read() for suffix in (".bin", ".idx"))


@pytest.fixture
def three(tmp_path):
    """Several sequences in a document, empty documents first and last, and a dataset of nothing else."""
    return [write_dataset(tmp_path / "a", [[], [3, 1], [5] * 9, [2]]), write_dataset(tmp_path / "b", [[]]),
            write_dataset(tmp_path / "c", [[4], [0, 6], []])]


def merge_by_megatron(prefixes, output, dtype=np.uint16, multimodal=False):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=dtype, multimodal=multimodal)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{output}.idx")
    return contents(output)


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_are_those_of_megatron_core(tmp_path, three, workers, monkeypatch):
    monkeypatch.setattr(merge, "BYTES_PER_TASK", 7)
    monkeypatch.setattr(merge, "BYTES_PER_BLOCK", 3)
    monkeypatch.setattr(index_file, "ENTRIES_PER_CHUNK", 2)
    prefixes = [*three, three[0]]
    theirs = merge_by_megatron(prefixes, tmp_path / "theirs")
    copied = []
    index = merge_datasets(prefixes, str(tmp_path / "new" / "ours"), workers, copied.append)
    assert contents(tmp_path / "new" / "ours") == theirs
    assert (index.num_sequences, sum(copied)) == (27, len(theirs[0]))
    assert sorted(os.listdir(tmp_path / "new")) == ["ours.bin", "ours.idx"]


def test_modes_of_multimodal_datasets_are_kept(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    for name, modes in (("a", [0, 1]), ("b", [1, 1])):
        builder = IndexedDatasetBuilder(f"{tmp_path}/{name}.bin", dtype=np.int32, multimodal=True)
        builder.add_document(torch.arange(5), [2, 3], modes)
        builder.finalize(f"{tmp_path}/{name}.idx")
    prefixes = [f"{tmp_path}/a", f"{tmp_path}/b"]
    merge_datasets(prefixes, f"{tmp_path}/ours")
    assert contents(tmp_path / "ours") == merge_by_megatron(prefixes, tmp_path / "theirs", np.int32, multimodal=True)


def test_without_copy_file_range(tmp_path, three, monkeypatch):
    def refused(*_):
        raise OSError("not on this file system")
    merge_datasets(three, str(tmp_path / "by_kernel"))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "copy_file_range", refused)
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:2], at))
    monkeypatch.setattr(merge, "BYTES_PER_BLOCK", 5)
    merge_datasets(three, str(tmp_path / "by_hand"))
    assert contents(tmp_path / "by_hand") == contents(tmp_path / "by_kernel")


def patch_file(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path, three):
    wide = write_dataset(tmp_path / "wide", [[2]], "<i4")
    before = sorted(os.listdir(tmp_path))
    for prefixes, output, message in (
            ([], "out", "no datasets are given"),
            ([three[0], wide], "out", "wide has ids of int32, but .*/a of uint16"),
            (three, "b", "/b is an input and an output too"),
            ([three[0], str(tmp_path / "d")], "out", "d.idx does not exist")):
        with pytest.raises(ValueError, match=message):
            merge_datasets(prefixes, str(tmp_path / output))
    index = open_index(three[2], "dataset")
    patch_file(index.path, index.pointers.offset + 8, b"\x07")
    with pytest.raises(ValueError, match="c.idx: sequence 1 begins at byte 7, and the one before it ends at 8"):
        merge_datasets(three, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == before


def test_a_source_cut_while_it_is_copied(tmp_path, three, monkeypatch):
    monkeypatch.setattr(merge, "byte_ranges", lambda slices: [
        merge.ByteRange(slices[0].index.prefix + ".bin", 0, 0, 1000)])
    with pytest.raises(ValueError, match="a.bin was cut while it was copied: it ends at byte 102"):
        merge_datasets(three, str(tmp_path / "out"))
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]
