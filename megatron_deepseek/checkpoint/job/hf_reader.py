"""DCP's StorageReader for a Hugging Face directory, from which a job loads released weights directly.

torch.distributed.checkpoint (DCP) asks a StorageReader what is stored, works out which parts of it each shard overlaps,
and asks for those, so each rank reads only the rows that its shards need. DCP's own Hugging Face readers know neither
stacked experts nor this project's checks; this one presents the directory as the parameters of training, with every
expert's projection as a chunk of its stack.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from megatron_deepseek.checkpoint.convert.block_fp8 import BLOCK
from megatron_deepseek.checkpoint.convert.names import Place, native_places
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.native import WEIGHTS


class HuggingFaceReader(StorageReader):
    """Presents `source` as a DCP checkpoint of tensors `model.NAME`; FP8 weights are read as float32 values."""

    def __init__(self, source: TensorSource, places: Sequence[Place] | None = None):
        """Take the places of the source's tensors in parameters; None for those of a model."""
        self.source = source
        self.of_tensors = native_places(source.config) if places is None else places
        self.places: dict[MetadataIndex, Place] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Do nothing, since nothing is kept between loads."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return Path(checkpoint_id).is_dir()

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """Return the stacked parameters' shapes and chunks in DCP's classes, for its planner."""
        chunks, shapes = defaultdict(list), {}
        for place in self.of_tensors:
            name, offset = WEIGHTS + place.whole, torch.Size(place.offset)
            self.places[MetadataIndex(name, offset)] = place
            shapes[name] = torch.Size(place.whole_shape)
            chunks[name].append(ChunkStorageMetadata(offset, torch.Size(place.extent)))
        tensors = {name: TensorStorageMetadata(TensorProperties(dtype=torch.float32), shapes[name], parts)
                   for name, parts in chunks.items()}
        return Metadata(tensors, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args, **kwargs) -> None:
        """Compute the chunks' places on every rank; DCP asks only the first for the metadata."""
        if not self.places:
            self.read_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            self._fill(item, target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, item: ReadItem, target: torch.Tensor) -> None:
        """Read whole rows, from the beginning of their block of 128, and copy the part that was asked for."""
        place = self.places[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
        axis = len(place.whole_shape) - len(place.shape)
        start, count = item.storage_offsets[axis], item.lengths[axis]
        step = max(BLOCK, (1 << 23) // max(torch.Size(place.shape[1:]).numel(), 1) // BLOCK * BLOCK)
        rows = target.view(target.shape[axis:])
        for begin in range(start // BLOCK * BLOCK, start + count, step):
            end = min(begin + step, place.shape[0])
            part = self.source.read(place.name, begin, end)[max(start - begin, 0):max(start + count - begin, 0)]
            if len(place.shape) == 2:
                part = part[:, item.storage_offsets[-1]:item.storage_offsets[-1] + item.lengths[-1]]
            at = max(begin, start) - start
            rows[at:at + part.shape[0]].copy_(part)
