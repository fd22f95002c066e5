"""checkpoint/dcp_metadata.py and dcp_metadata_writer.py against torch.distributed.checkpoint itself."""

import gc
import pickle
import tracemalloc

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

from megatron_deepseek.checkpoint.dcp_files import DcpDirectory, Item
from megatron_deepseek.checkpoint.dcp_metadata_writer import write_metadata

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
    assert all(type(chunk.sizes) is torch.Size for entry in found.state_dict_metadata.values() for chunk in entry.chunks)


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
    """What stays of an item is below 250 bytes; reading takes 500 for a moment, writing 50. V3 with moments on 2,048 ranks
    has 350,000.
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
