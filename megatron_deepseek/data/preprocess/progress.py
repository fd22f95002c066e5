"""The progress of a run: a bar on a terminal, elsewhere a line now and then."""

import os
import sys
import time

from megatron_deepseek.data.preprocess.workers import Counters

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows the counters at every `tick`. `total` is in bytes as stored, 0 if unknown."""

    def __init__(self, counters: Counters, total: int, interval: int, say):
        self.counters, self.total, self.interval, self.say = counters, total, interval, say
        self.start = self.said_at = time.perf_counter()
        self.said_documents = 0
        self.bar = _bar(total) if _shows_bars() else None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def tick(self):
        size, documents, tokens = self.counters.read()
        rate = tokens / max(self.seconds, 1e-3) / 1e6
        if self.bar is not None:
            self.bar.set_postfix_str(f"{documents} documents, {rate:.2f} Mtok/s", refresh=False)
            self.bar.update(size - self.bar.n)
        elif self._is_time(documents):
            self.said_at, self.said_documents = time.perf_counter(), documents
            left = (self.total - size) * self.seconds / size if size and self.total else 0
            share = f" of {self.total / 1e6:.0f}" if self.total else ""
            self.say(f"Processed {documents} documents, {size / 1e6:.0f}{share} MB ({rate:.2f} Mtok/s"
                     + (f", {left:.0f} s left)" if self.total else ")"))

    def _is_time(self, documents: int) -> bool:
        return (documents - self.said_documents >= self.interval
                and time.perf_counter() - self.said_at >= SECONDS_BETWEEN_LINES)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def _shows_bars() -> bool:
    """Return whether stderr is a terminal with a width: some say 0 columns, where a bar is nothing."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def _bar(total: int):
    from tqdm import tqdm
    tqdm.monitor_interval = 0  # its thread must not run when workers are forked
    return tqdm(total=total or None, unit="B", unit_scale=True, dynamic_ncols=True)
