"""Interruptions: signals to any rank, and the clock of the first, ask a run to save or to leave before its end.

Python runs a signal's handler between two bytecodes, so the handler only stores the signal; the ranks agree in the
collective that adds up their losses, and act after that step. A second Ctrl-C asks for an end now, even if the main
thread waits in a collective: a thread reads the signal numbers that Python's own handler in C writes to a file.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_deepseek.launch.ending import INTERRUPTED
from megatron_deepseek.launch.signals import numbers_read
from megatron_deepseek.settings import RunSettings
from megatron_deepseek.training.trainer import StopFlags

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_AGAIN = (signal.SIGINT, signal.SIGTERM)  # torchrun passes a second Ctrl-C on as SIGTERM


class Interruptions:
    """The requests of this rank: `stop_flags()` are those of now. `begun`: when the job began, by time.monotonic()."""

    def __init__(self, run: RunSettings, first_rank: bool, begun: float):
        minutes, seconds = run.exit_duration_in_mins, run.save_every_seconds
        self.deadline = begun + 60 * minutes if minutes is not None and first_rank else None
        self.period = seconds if first_rank else None
        self.saved_at = time.monotonic()
        self.signal: signal.Signals | None = None
        self.first_word = "Ctrl-C: this step ends, then the run " + (
            "leaves" if run.save is None else "saves and leaves") + "; once more: it leaves at once"

    def stop_flags(self) -> StopFlags:
        due = self.period is not None and time.monotonic() - self.saved_at >= self.period
        return StopFlags(save=due, leave=self.signal is not None or self._late())

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def saved(self) -> None:
        """Start the next period of --save-every-seconds: a checkpoint was begun."""
        self.saved_at = time.monotonic()

    def reason(self) -> str:
        if self.signal is not None:
            return f"on {self.signal.name}"
        return "as --exit-duration-in-mins says" if self._late() else "as another rank was told to"

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Store SIGTERM, SIGUSR1 and SIGINT instead of dying of them, and leave at once on a second SIGINT.

        Outside the main thread this does nothing. A signal that is ignored stays so (SIGINT of a background process).
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        with numbers_read(self._read):
            before = {number: signal.signal(number, self._note) for number in wanted}
            try:
                yield
            except BaseException:
                _restore(before)
                if self.signal is not None:  # the rest of the job is gone: the sender wants an end, not a checkpoint
                    signal.raise_signal(self.signal)
                raise
            _restore(before)

    def _note(self, number: int, _frame) -> None:
        self.signal = signal.Signals(number)

    def _read(self, file: int) -> None:
        """Read numbers of signals from `file` as they come, in a thread, and end the process at a second Ctrl-C."""
        interrupted = False
        while numbers := os.read(file, 64):
            for number in numbers:
                if interrupted and number in _AGAIN:
                    _say("Ctrl-C again: leaving at once; checkpoints that were saved are whole")
                    os._exit(INTERRUPTED)
                if number == signal.SIGINT:
                    interrupted = True
                    _say(self.first_word)


def _say(line: str) -> None:
    """Print `line` once on each node, by one write: the main thread may be in the middle of its own."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"{line}\n".encode())


def _restore(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
