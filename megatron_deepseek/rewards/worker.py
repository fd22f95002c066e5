"""The process in which reward functions run, started by workers.py: it may hang, die or be killed at any time.

What it is asked comes over a socket, pickled; what it answers is JSON, since nobody should unpickle what a process
says that runs strange code. Whatever functions print goes to the error output.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection

from megatron_deepseek.rewards.ready import READY
from megatron_deepseek.rewards.result import RAISED, Failure, checked
from megatron_deepseek.rewards.spec import RewardSpec

_SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h


def load(spec: RewardSpec) -> Callable[..., list]:
    """Return the function of a spec. Raise whatever its file does, ValueError where that has no such function."""
    if spec.is_model:
        from megatron_deepseek.rewards.model import ModelReward
        return ModelReward(spec.path)
    if spec.is_ready:
        ready = READY[spec.function]
        if ready.package is not None:
            importlib.import_module(ready.package[1])
        return partial(ready.function, **dict(spec.options))
    function = getattr(_module(spec), spec.function, None)
    if not callable(function):
        raise ValueError(f"{spec.path} has no function {spec.function}")
    return function


def _module(spec: RewardSpec):
    """Return the module of a file, which may import what lies beside it."""
    sys.path.insert(0, str(spec.path.parent))
    found = importlib.util.spec_from_file_location(spec.path.stem, spec.path)
    module = importlib.util.module_from_spec(found)
    sys.modules[spec.path.stem] = module
    found.loader.exec_module(module)
    return module


def call(function: Callable[..., object], batch: Sequence[list]) -> dict:
    """Return what a function gives for a batch (prompts, completions, rows), or its failure, in JSON's types."""
    try:
        found = checked(function(*batch), len(batch[0]))
    except BaseException as error:  # SystemExit too: a function that exits has not rewarded
        found = Failure(RAISED, words_of(error))
    if isinstance(found, Failure):
        return {"failed": [found.kind, found.message]}
    return {"values": [[each.kind, each.message] if isinstance(each, Failure) else each for each in found]}


def words_of(error: BaseException) -> str:
    """Return an error's type, its first line, and where in the last file it was raised."""
    lines, place = str(error).strip().splitlines(), error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" ({place.tb_frame.f_code.co_filename}:{place.tb_lineno})" if place is not None else ""
    return f"{type(error).__name__}: {lines[0] if lines else ''}{where}"


def serve(connection: Connection) -> None:
    """Load the functions that the first message names, then answer calls until the other side closes."""
    own, (specs, memory_bytes) = os.getpid(), pickle.loads(connection.recv_bytes())
    functions, spec = [], None
    if memory_bytes is not None:
        limit_memory(memory_bytes)
    try:
        for spec in specs:
            functions.append(load(spec))
        _say(connection, own, {"ready": True})
    except BaseException as error:
        _say(connection, own, {"spec": str(spec), "why": words_of(error)})
    while True:
        number, batch = pickle.loads(connection.recv_bytes())
        _say(connection, own, call(functions[number], batch))


def limit_memory(size: int) -> None:
    """Let this process have so many bytes that it can write to. Files that are mapped, and addresses that CUDA reserves
    and does not use, are not counted.
    """
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    size = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (size, hard))


def _say(connection: Connection, own: int, said: dict) -> None:
    if os.getpid() != own:
        os._exit(0)  # a copy of this process that a function made, and that came back from it
    connection.send_bytes(json.dumps(said).encode())


def main() -> None:
    """Serve the socket whose number is the argument; end with the process that started this one."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    descriptor, parent = map(int, sys.argv[1:3])
    os.set_inheritable(descriptor, False)
    if os.getppid() != parent:
        return
    try:
        serve(Connection(descriptor))
    except (EOFError, ConnectionError):
        os._exit(0)


if __name__ == "__main__":
    main()
