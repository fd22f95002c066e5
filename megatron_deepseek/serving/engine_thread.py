"""The engine in a thread of its own, so that a step never keeps the event loop from reading and writing.

The event loop asks by a queue; answers of a step come back all together, by one call into the loop. The thread alone
touches the engine, and with it the other ranks.
"""

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.statistics import Statistics


@dataclass(frozen=True)
class _Add:
    request_id: str
    prompt: tuple[int, ...]
    parameters: SamplingParameters


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Close:
    """The end of the thread."""


class EngineThread:
    """Steps the engine while there is work. `take` gets the answers of a step, `failed` is told that none will come.

    Both are called in the event loop. `verbose` prints what ended the thread with its traceback.
    """

    def __init__(self, replicas: Replicas, take: Callable[[list[Output]], None], failed: Callable[[], None],
                 verbose: bool = False):
        self.replicas, self._take, self._failed, self._verbose = replicas, take, failed, verbose
        self._commands: queue.SimpleQueue[_Add | _Abort | _Close] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to step; answers go to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def statistics(self) -> Statistics:
        """Return what the engine has done until its last step."""
        return self.replicas.statistics

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def add(self, request_id: str, prompt: tuple[int, ...], parameters: SamplingParameters) -> None:
        """Ask for answers to a prompt that `Engine.check` has seen."""
        self._commands.put(_Add(request_id, prompt, parameters))

    def abort(self, request_id: str) -> None:
        """Stop a request, whose blocks are free after the next step; one that is finished or unknown is ignored."""
        self._commands.put(_Abort(request_id))

    def close(self, seconds: float) -> None:
        """Stop what runs, let the other ranks leave, and wait so long for the thread's end."""
        self._commands.put(_Close())
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while self._obey():
                outputs = self.replicas.step()
                if outputs:
                    self._loop.call_soon_threadsafe(self._take, outputs)
            self.replicas.close()
        except BaseException as error:
            # Nobody joins to see it: said here, in one line since its words may hold paths.
            print(f"the engine has stopped: {type(error).__name__}", file=sys.stderr, flush=True)
            if self._verbose:
                traceback.print_exc()
            self._loop.call_soon_threadsafe(self._failed)

    def _obey(self) -> bool:
        """Take what was asked since the last step, waiting for something where there is no work; False for the end."""
        wait = not self.replicas.has_work
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if isinstance(command, _Close):
                return False
            if isinstance(command, _Add):
                self.replicas.add(command.prompt, command.parameters, command.request_id)
            else:
                self.replicas.abort(command.request_id)
