"""The storage side of a load: DCP's plan, each part read from its bytes of a file straight to where it belongs.

DCP's own reader makes a tensor of the whole saved item first, then copies the wanted part.
"""

from collections import defaultdict
from operator import add

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_deepseek.checkpoint.boxes import Box
from megatron_deepseek.checkpoint.dcp_files import Item
from megatron_deepseek.checkpoint.dcp_reader import read_part


class CheckpointReader(dcp.FileSystemReader):
    """Reads what `CheckpointWriter`, the converter or DCP itself wrote."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args, **kwargs) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._tensors = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Files one after another, each from its beginning to its end. ValueError names the file and the tensor."""
        requests: dict[str, list[tuple[Item, ReadItem]]] = defaultdict(list)
        shapes: dict[str, dict] = {}
        for request in plan.items:
            item = self._item(request.storage_index, shapes)
            requests[item.file].append((item, request))
        for name, of_file in requests.items():
            with open(self.path / name, "rb", buffering=0) as file:
                for item, request in sorted(of_file, key=lambda pair: pair[0].offset):
                    self._read(file, item, request, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _item(self, index: MetadataIndex, shapes: dict[str, dict]) -> Item:
        """What is stored under `index`; `shapes` remembers those of a tensor's chunks by their place."""
        entry, stored = self._tensors[index.fqn], self.storage_data[index]
        if index.fqn not in shapes:
            shapes[index.fqn] = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
        place = tuple(index.offset)
        return Item(index.fqn, place, shapes[index.fqn][place], entry.properties.dtype, stored.relative_path,
                    stored.offset, stored.length)

    def _read(self, file, item: Item, request: ReadItem, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(request).detach()
        place = tuple(map(add, item.place, request.storage_offsets))
        try:
            read_part(file.fileno(), item, Box(place, tuple(request.lengths)), target)
        except (OSError, EOFError, RuntimeError) as error:
            raise ValueError(f"{self.path / item.file}: {item.name} cannot be read: {error}") from error
        planner.commit_tensor(request, target)
