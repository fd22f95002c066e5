"""What asks a run to save or to leave before its time: signals to any rank, and the clock of the first.

Python hands a signal over between two bytecodes, so the handler only takes a note; the ranks agree in the collective
that adds up their losses, and act after that step.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_deepseek.settings import RunSettings
from megatron_deepseek.training.trainer import Votes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruptions:
    """`votes()` is what this rank asks for now. `begun`: when the job began, by time.monotonic()."""

    def __init__(self, run: RunSettings, first_rank: bool, begun: float):
        minutes, seconds = run.exit_duration_in_mins, run.save_every_seconds
        self.deadline = begun + 60 * minutes if minutes is not None and first_rank else None
        self.period = seconds if first_rank else None
        self.saved_at = time.monotonic()
        self.signal: signal.Signals | None = None

    def votes(self) -> Votes:
        due = self.period is not None and time.monotonic() - self.saved_at >= self.period
        return Votes(save=due, leave=self.signal is not None or self._late())

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def saved(self) -> None:
        """A checkpoint was begun: the next period starts."""
        self.saved_at = time.monotonic()

    def reason(self) -> str:
        if self.signal is not None:
            return f"on {self.signal.name}"
        return "as --exit-duration-in-mins says" if self._late() else "as another rank was told to"

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Take a note of SIGTERM and SIGUSR1 instead of dying of them. Elsewhere than in the main thread, nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        except BaseException:
            _restore(before)
            if self.signal is not None:  # the rest of the job is gone: whoever sent it wants an end, not a checkpoint
                signal.raise_signal(self.signal)
            raise
        _restore(before)

    def _note(self, number: int, _frame) -> None:
        self.signal = signal.Signals(number)


def _restore(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
