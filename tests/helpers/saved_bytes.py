"""Bytes that autograd keeps between forward and backward, seen by saved-tensor hooks: what planning calculates."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from megatron_deepseek.model import layer
from megatron_deepseek.ops import offload
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled, parts_of


class _Holder:
    """What a node of the graph holds in place of a saved tensor; it goes when the node goes."""

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def identity(storage: torch.UntypedStorage) -> int:
    """Return a number that stays a storage's own also while its memory is freed and allocated again, as FSDP does."""
    return storage._cdata  # noqa: SLF001 (torch's; there is no public one)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages of `tensors`, each once."""
    storages = (part.untyped_storage() for tensor in tensors for part in parts_of(tensor))
    return sum({identity(each): each.nbytes() for each in storages}.values())


@dataclass(frozen=True)
class Saved:
    """Bytes of all storages that the graph holds on the device, each once, and of what went to the host's memory."""

    device: int
    host: int


class MostSaved:
    """Follows, while it is entered, how many bytes of storages the graphs of all forwards hold together; `most` is the
    largest number that there was. Storages of `given` do not count.
    """

    def __init__(self, given: Iterable[torch.Tensor]):
        self._known = {identity(tensor.untyped_storage()) for tensor in given}
        self._holders: dict[int, int] = {}
        self._now = self.most = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda holder: holder.tensor)

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _keep(self, tensor: torch.Tensor) -> _Holder:
        holder, parts = _Holder(tensor), parts_of(tensor) if isinstance(tensor, BlockScaled) else (tensor,)
        for number, size in {(identity(each), each.nbytes()) for each in (part.untyped_storage() for part in parts)}:
            if number not in self._known:
                self._change(number, size, 1)
                weakref.finalize(holder, self._change, number, size, -1)
        return holder

    def _change(self, storage: int, size: int, by: int) -> None:
        before = self._holders.get(storage, 0)
        self._holders[storage] = before + by
        self._now += size * ((before + by > 0) - (before > 0))
        self.most = max(self.most, self._now)


def saved_bytes(run: Callable[[], torch.Tensor], given: Iterable[torch.Tensor], monkeypatch) -> Saved:
    """Return what is kept of `run` while its result lives, but for the storages of `given`: weights and inputs."""
    held, sent = weakref.WeakSet(), []
    to_host = offload.to_host

    def keep(tensor):
        holder = _Holder(tensor)
        held.add(holder)
        return holder

    def count_and_send(tensor):
        sent.append(tensor.untyped_storage().nbytes())
        return to_host(tensor)

    class Watched(offload.saved_on_host):
        """saved_on_host whose tensors that stay on the device are seen too."""

        def __init__(self, stays):
            super().__init__(stays)
            pack, unpack = self.pack_hook, self.unpack_hook

            def watched(tensor):
                packed = pack(tensor)
                return keep(packed) if isinstance(packed, torch.Tensor) else packed

            self.pack_hook = watched
            self.unpack_hook = lambda packed: packed.tensor if isinstance(packed, _Holder) else unpack(packed)

    monkeypatch.setattr(offload, "to_host", count_and_send)
    monkeypatch.setattr(layer, "saved_on_host", Watched)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
        result = run()
    known = {identity(tensor.untyped_storage()) for tensor in given}
    storages = [part.untyped_storage() for holder in held
                for part in (parts_of(holder.tensor) if isinstance(holder.tensor, BlockScaled) else (holder.tensor,))]
    device = {identity(each): each.nbytes() for each in storages if identity(each) not in known}
    assert result.requires_grad
    return Saved(sum(device.values()), sum(sent))
