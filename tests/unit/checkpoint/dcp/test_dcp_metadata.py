"""checkpoint/dcp/metadata.py and metadata_writer.py against torch.distributed.checkpoint itself."""

import copyreg
import gc
import pickle
import re
import resource
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from forked import run_script
from pickle_damage import mutations

from megatron_deepseek.checkpoint.dcp import files as dcp_files
from megatron_deepseek.checkpoint.dcp.files import DcpDirectory, Item
from megatron_deepseek.checkpoint.dcp.metadata_writer import write_metadata
from megatron_deepseek.checkpoint.integrity import checksum_directory

SHAPES = {"model.scalar": (), "model.weight": (6, 5), "optimizer.exp_avg.large": (70_000, 3)}
ITEMS = [
    Item("model.scalar", (), (), torch.float64, "a.distcp", 0, 700),
    Item("model.weight", (0, 0), (4, 5), torch.bfloat16, "a.distcp", 700, 800),
    Item("model.weight", (4, 0), (2, 5), torch.bfloat16, "b.distcp", 0, 800),
    Item("optimizer.exp_avg.large", (0, 0), (69_999, 3), torch.float32, "b.distcp", 5 << 32, 3 << 31),
    Item("optimizer.exp_avg.large", (69_999, 0), (1, 3), torch.float32, "b.distcp", (1 << 31) - 1, 1 << 31),
]


def by_dcp() -> Metadata:
    """SHAPES and ITEMS in DCP's own classes."""
    tensors, storage = {}, {}
    for name, shape in SHAPES.items():
        items = [item for item in ITEMS if item.name == name]
        chunks = [ChunkStorageMetadata(torch.Size(item.place), torch.Size(item.shape)) for item in items]
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=items[0].dtype), torch.Size(shape), chunks)
        storage |= {MetadataIndex(name, item.place, number): _StorageInfo(item.file, item.offset, item.length)
                    for number, item in enumerate(items)}
    return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(), version="1.0.0")


def test_dcp_reads_what_is_written(tmp_path):
    write_metadata(tmp_path, SHAPES, ITEMS)
    found, expected = dcp.FileSystemReader(tmp_path).read_metadata(), by_dcp()
    expected.storage_meta.load_id = found.storage_meta.load_id  # the reader's own
    assert found == expected
    assert [index.index for index in found.storage_data] == [index.index for index in expected.storage_data]
    chunks = [chunk for entry in found.state_dict_metadata.values() for chunk in entry.chunks]
    assert all(type(chunk.sizes) is torch.Size for chunk in chunks)


@pytest.mark.parametrize("write", (lambda path: write_metadata(path, SHAPES, ITEMS),
                                   lambda path: (path / ".metadata").write_bytes(pickle.dumps(by_dcp()))))
def test_both_are_read(tmp_path, write):
    write(tmp_path)
    found = DcpDirectory(tmp_path)
    assert found.shapes == SHAPES
    assert [item for items in found.items.values() for item in items] == ITEMS


def test_what_is_no_tensor_is_passed_over(tmp_path):
    metadata = by_dcp()
    metadata.state_dict_metadata["state.step"] = BytesStorageMetadata()
    metadata.planner_data = {"state.step": ("state", "step")}
    metadata.storage_meta.checkpoint_id = tmp_path
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert DcpDirectory(tmp_path).shapes == SHAPES


def damaged(change) -> bytes:
    """What DCP writes of `by_dcp()` after a change of it."""
    metadata = by_dcp()
    change(metadata, metadata.state_dict_metadata["model.weight"])
    return pickle.dumps(metadata)


def stored(metadata, **changes) -> None:
    index = MetadataIndex("model.weight", torch.Size((4, 0)))
    metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)


WRONG = {
    "no shape": (lambda all, tensor: setattr(tensor, "size", 5), "does not say the shapes of model.weight"),
    "negative shape": (lambda all, tensor: setattr(tensor, "size", (-6, -5)), "the shapes of model.weight"),
    "no type": (lambda all, tensor: setattr(tensor, "properties", None), "does not say the type of model.weight"),
    "no parts": (lambda all, tensor: setattr(tensor, "chunks", None), "does not say the shapes of model.weight"),
    "a part less": (lambda all, tensor: tensor.chunks.pop(), "model.weight do not hold each number of its shape"),
    "a part twice": (lambda all, tensor: tensor.chunks.append(tensor.chunks[0]), "model.weight do not hold each"),
    "a part of two dimensions less": (lambda all, tensor: setattr(tensor.chunks[0], "sizes", ()), "not say the shapes"),
    "larger than anything": (lambda all, tensor: setattr(tensor, "size", (2**40, 2**40)), "do not hold each number"),
    "nowhere": (lambda all, tensor: all.storage_data.clear(), "does not say where model.scalar at"),
    "in another directory": (lambda all, tensor: stored(all, relative_path="../a.distcp"), "cannot be where it says"),
    "in a device": (lambda all, tensor: stored(all, relative_path="/dev/zero"), "cannot be where it says"),
    "in no file": (lambda all, tensor: stored(all, relative_path=None), "cannot be where it says"),
    "before the file": (lambda all, tensor: stored(all, offset=-1), "cannot be where it says"),
    "shorter than its numbers": (lambda all, tensor: stored(all, length=19), "the 20 bytes of model.weight at (4, 0)"),
    "compressed": (lambda all, tensor: stored(all, transform_descriptors=["zstd"]), "stored compressed"),
    "a name of two lines": (lambda all, tensor: all.state_dict_metadata.update({"a\nb": tensor}), "'a\\nb', which is"),
    "a name of half a pair": (lambda all, tensor: all.state_dict_metadata.update({"\ud800": tensor}), "damaged"),
    "another class": (lambda all, tensor: setattr(all, "state_dict_metadata", []), "no metadata of torch.distributed"),
    "no storage": (lambda all, tensor: setattr(all, "storage_data", None), "no metadata of torch.distributed"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, what):
    change, said = WRONG[what]
    (tmp_path / ".metadata").write_bytes(damaged(change))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        DcpDirectory(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


class IndexOf:
    """Pickled as DCP's index of what it need not be able to hash."""

    __class__ = MetadataIndex  # pickle compares

    def __init__(self, fqn):
        self.fqn = fqn

    def __reduce__(self):
        return copyreg.__newobj__, (MetadataIndex,), {"fqn": self.fqn, "offset": torch.Size(()), "index": 0}


def test_places_of_no_names_are_passed_over(tmp_path):
    """Also one that takes for ever to hash, and one that cannot be hashed."""
    nested = ()
    for _ in range(60):
        nested = (nested, nested)
    for fqn in (nested, [], None):
        content = damaged(lambda metadata, tensor: metadata.storage_data.update({IndexOf(fqn): None}))
        (tmp_path / ".metadata").write_bytes(content)
        assert DcpDirectory(tmp_path).shapes == SHAPES


def test_one_list_of_parts_for_many_tensors_is_not_gone_through_for_each(tmp_path):
    def share(metadata, tensor):
        tensor.size, one = torch.Size((1000,)), torch.Size((1,))
        tensor.chunks[:] = [ChunkStorageMetadata(torch.Size((row,)), one) for row in range(1000)]
        metadata.state_dict_metadata.update({f"t{number}": tensor for number in range(1000)})

    (tmp_path / ".metadata").write_bytes(damaged(share))
    with pytest.raises(ValueError, match="has 1,001,003 chunks of tensors, but says of 5 only where they are$"):
        DcpDirectory(tmp_path)


def test_the_checksum_comes_before_the_reading(tmp_path, monkeypatch):
    """Whatever a changed file would do to its reader, it is not read."""
    write_metadata(tmp_path, SHAPES, ITEMS)
    checksum_directory(tmp_path)
    assert DcpDirectory(tmp_path).shapes == SHAPES
    data = bytearray((tmp_path / ".metadata").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / ".metadata").write_bytes(data)
    monkeypatch.setattr(dcp_files, "read_metadata", lambda directory: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=f"^{tmp_path}/.metadata has changed: "):
        DcpDirectory(tmp_path)


def test_mutations_cost_neither_memory_nor_time(tmp_path):
    """Without checksums, as older checkpoints and Megatron-LM's are, in a process that may have little of both."""
    directory, errors = tmp_path / "checkpoint", tmp_path / "errors"
    directory.mkdir()
    assert run_script([__file__, str(directory)], errors, errors) == 0, errors.read_text()


def survive_mutations(directory) -> None:
    directory = Path(directory)
    write_metadata(directory, SHAPES, ITEMS)
    sound = [(directory / ".metadata").read_bytes(), pickle.dumps(by_dcp()), pickle.dumps(by_dcp(), 2)]
    held, begun, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), 0
    for changed in (changed for data in sound for changed in mutations(data, 400, 1)):
        (directory / ".metadata").write_bytes(changed)
        try:
            DcpDirectory(directory)
        except ValueError as error:
            assert str(directory) in str(error) and "\n" not in str(error) and len(str(error)) < 400, error
            refused += 1
    assert refused > 600  # of 1,200; the others changed what is of no use, or into what may be
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 50_000  # KiB
    assert time.process_time() - begun < 60


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_that_a_pickle_names_is_run(tmp_path):
    metadata = by_dcp()
    metadata.planner_data = Bomb(tmp_path / "exploded")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert DcpDirectory(tmp_path).shapes == SHAPES
    assert not (tmp_path / "exploded").exists()


def test_memory_of_many_items(tmp_path):
    """What stays of an item is below 250 bytes; reading takes 500 for a moment, writing 50. V3 with moments on 2,048
    ranks has 350,000.
    """
    layers, parts = 10, 300
    shapes = {f"model.layers.{layer}.weight": (parts, 7) for layer in range(layers)}
    gc.collect()
    tracemalloc.start()
    items = [Item(name, (row, 0), (1, 7), torch.float32, f"__{row}_0.distcp", row * 100_000, 100_000)
             for name in shapes for row in range(parts)]
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    write_metadata(tmp_path, shapes, items)
    write_peak = tracemalloc.get_traced_memory()[1] - before
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    found = DcpDirectory(tmp_path)
    read_peak, held = tracemalloc.get_traced_memory()[1] - before, tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert sum(map(len, found.items.values())) == len(items)
    assert held < 250 * len(items)
    assert read_peak < 500 * len(items)
    assert write_peak < 50 * len(items)


def test_the_tools_start_without_dcp():
    """Half a second of their start."""
    program = """import sys
import megatron_deepseek.cli.convert_checkpoint_run, megatron_deepseek.cli.reshard_checkpoint_run
print(*(name for name in ("torch.distributed.checkpoint", "megatron_deepseek.model.build") if name in sys.modules))"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


if __name__ == "__main__":
    survive_mutations(sys.argv[1])
