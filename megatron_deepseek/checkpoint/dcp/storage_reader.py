"""DCP's StorageReader for loading into a job: what the plan asks for is read straight into the tensors' memory.

DCP's own reader unpickles .metadata, which may name any code to be run, and for any part of a saved item it loads the
whole item first.
"""

import os
from collections import defaultdict
from operator import add
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_deepseek.checkpoint.dcp.files import DcpDirectory, Item
from megatron_deepseek.checkpoint.dcp.item_reader import read_part
from megatron_deepseek.parallel.regions import Region


class CheckpointReader(dcp.StorageReader):
    """Reads the tensors of a directory that `CheckpointWriter`, the converter or DCP itself wrote."""

    def __init__(self, stored: DcpDirectory):
        self.stored = stored
        self._items = {name: {item.place: item for item in items} for name, items in stored.items.items()}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Do nothing: DCP names the directory here, which the constructor was given already."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return Path(checkpoint_id).is_dir()

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """Return the tensors' shapes, dtypes and chunks in DCP's own classes, for its planner."""
        tensors = {}
        for name, shape in self.stored.shapes.items():
            chunks = [ChunkStorageMetadata(torch.Size(item.place), torch.Size(item.shape))
                      for item in self.stored.items[name]]
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=self.stored.dtypes[name]), torch.Size(shape),
                                                  chunks)
        return Metadata(tensors, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args, **kwargs) -> None:
        """Do nothing: the constructor was given everything."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read files one after another, each from its beginning to its end.

        Raise ValueError, naming file and tensor, if something cannot be read.
        """
        requests: dict[str, list[tuple[Item, ReadItem]]] = defaultdict(list)
        for request in plan.items:
            index = request.storage_index
            item = self._items[index.fqn][tuple(index.offset)]
            requests[item.file].append((item, request))
        for name, requests_of_file in requests.items():
            with open(self.stored.directory / name, "rb", buffering=0) as file:
                for item, request in sorted(requests_of_file, key=lambda pair: pair[0].offset):
                    self._read(file, item, request, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, file, item: Item, request: ReadItem, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(request).detach()
        place = tuple(map(add, item.place, request.storage_offsets))
        try:
            read_part(file.fileno(), item, Region(place, tuple(request.lengths)), target)
        except (OSError, EOFError, RuntimeError) as error:
            raise ValueError(f"{file.name}: {item.name} cannot be read: {error}") from error
        planner.commit_tensor(request, target)
