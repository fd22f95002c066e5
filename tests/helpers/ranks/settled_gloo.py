"""Collectives over gloo that hold nothing any more once somebody has waited for them.

A thread of gloo that has done a collective wakes whoever waits for it, and only then lets go of its tensors: some of
them are freed later than the program would, in each run at another moment. A log of storages shows that. Here gloo is
given an alias of each tensor, and a wait ends when nobody else has the aliases. So each storage ends when the program,
and the Work that it has, let go of it; nothing is copied, and no collective begins or ends earlier.

Enter the mode before those that look on, so that these see the tensors of the program.
"""

import time

import torch
from torch.distributed import Work
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_ALONE = 1  # the count of a tensor that one variable has
_PATIENCE = 60.0  # seconds until a thread that does not let go is a fault
_GROUP = {"process_group", "group_name"}  # the arguments by which collectives are known
_WAIT = torch.ops._c10d_functional.wait_tensor.default  # noqa: SLF001 (torch's name)


class SettledGloo(TorchDispatchMode):
    """While it is entered, waits for the threads of gloo to let go of tensors."""

    def __init__(self):
        super().__init__()
        self._functional: dict[int, list[torch.Tensor]] = {}  # by the storage that is to be waited for
        self._running: set[_Settled] = set()  # a Work is Python's only as long as Python has it

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(issubclass(each, (DTensor, AsyncCollectiveTensor)) for each in types):
            return NotImplemented  # their own operators come here next, on plain tensors
        if operator is _WAIT:
            return self._waited(*args)
        if _GROUP.isdisjoint(each.name for each in operator._schema.arguments):  # noqa: SLF001 (torch's)
            return operator(*args, **(kwargs or {}))
        lent = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        result = operator(*lent[0], **lent[1])
        aliases = [each for each in tree_leaves(lent) if isinstance(each, torch.Tensor)]
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        del lent
        if operator.namespace == "c10d":
            boxed = result[-1] if isinstance(result, tuple) else result
            work = _Settled(self._running, Work.unbox(boxed), aliases, given)
            return (args[0], work.boxed()) if isinstance(result, tuple) else work.boxed()
        return tree_map_only(torch.Tensor, lambda each: self._lent(each, aliases, given), result)

    def _lent(self, result: torch.Tensor, aliases: list[torch.Tensor], given: list[torch.Tensor]) -> torch.Tensor:
        """Return what a functional collective gives, and remember who must let go of what."""
        own = next((each for alias, each in zip(aliases, given) if alias is result), None)
        self._functional[_key(result)] = [*aliases, *(() if own is not None else (result,))]
        return result.detach() if own is None else own

    def _waited(self, tensor: torch.Tensor) -> torch.Tensor:
        lent = self._functional.pop(_key(tensor), [])
        _WAIT(tensor)
        _settle(lent)
        return tensor


def _key(tensor: torch.Tensor) -> int:
    return StorageWeakRef(tensor.untyped_storage()).cdata


class _Settled(Work):
    """The `work` of a collective on `aliases`, which keeps the tensors that they are of."""

    def __init__(self, running: set["_Settled"], work: Work, aliases: list[torch.Tensor], tensors: list[torch.Tensor]):
        super().__init__()
        self._running, self._work, self._aliases, self._tensors = running, work, aliases, tensors
        running.add(self)

    def wait(self, timeout=None) -> bool:
        if self._work is not None:
            self._work.wait()
            self._work = None
            _settle(self._aliases)
            self._running.discard(self)
        return True


def _settle(aliases: list[torch.Tensor]) -> None:
    """Wait until nobody but the caller has the aliases; the list is emptied."""
    end = time.monotonic() + _PATIENCE
    while aliases:
        alias = aliases.pop()
        while alias._use_count() > _ALONE:  # noqa: SLF001 (torch's)
            if time.monotonic() > end:
                raise AssertionError(f"gloo holds {tuple(alias.shape)} {_PATIENCE:.0f} s after its collective")
            time.sleep(1e-4)
