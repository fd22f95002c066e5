"""When one rank fails, the job ends within seconds, and the user reads that rank's traceback and no other.

The failing rank claims the failure by an atomic add in the store that torchrun's agent keeps, prints its traceback
with its rank before every line, and leaves at once by `os._exit`: unwinding into process groups whose peers still
wait in a collective can block. torchrun then stops the other ranks of the node. Those that notice the failure before
that find the claim taken and leave silently, whatever their own error was. Ranks of other nodes, which no agent stops
and which may sit in a collective until its time-out, watch the store from a thread. A rank that is killed claims
nothing: its neighbours (neighbours.py) claim the failure for it. All of this works before the first process group
exists.

The store may be at the other end of a cut link, where it neither answers nor refuses, so every question to it has a
time-out.

The limit: a `finally` in `main` that waits for peers runs before any of this, so a guarded main must not destroy
process groups or meet a barrier there.
"""

import functools
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from megatron_deepseek.launch.agent import end_with_agent, tell_agent
from megatron_deepseek.parallel.restarts import agent_store
from megatron_deepseek.runtime.hang import describe_group, group_of, location, missing_ranks, timed_out
from megatron_deepseek.runtime.neighbours import Ring
from megatron_deepseek.torch_private import _get_default_store

WATCH_SECONDS = 1.0
# How long a rank that merely noticed a failure lets torchrun end it, or waits for the rank whose failure it was.
GRACE_SECONDS = 3.0
_STORE_SECONDS = 5.0  # for the store to answer
_END_SECONDS = 1.0  # for a thread that was told to end
_ANSWER_SECONDS = 2.0  # for other ranks' watches to see a failure and say where they are
# What gloo, NCCL and the store say when the other end is gone; none of it can be this rank's own mistake.
PEER_LOSS = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe",
             "remote process exited", "ncclRemoteError", "communicator was aborted", "Timed out waiting",
             "Socket Timeout", "Connection was likely closed")


def guarded(main: Callable, patience: float = 600.0) -> Callable:
    """Wrap `main`, the entry of a rank, so that one rank only reports a failure. Without a launcher it runs as it is.

    `patience`: seconds that a collective may take, after which a silent link between two ranks counts as cut.
    """

    @functools.wraps(main)
    def entry(*args, **kwargs):
        if "RANK" not in os.environ:
            return main(*args, **kwargs)
        end_with_agent()
        claim = FailureClaim(agent_store())
        try:
            with claim.watched(patience):
                return record(main, OneTraceback(claim))(*args, **kwargs)
        except KeyboardInterrupt:
            _leave(130)
        except Exception:
            _leave(1)

    return entry


class FailureClaim:
    """The claim to the job's first failure, which one rank makes and all ranks see.

    `store` is the agent's, or None where a launcher without one (srun, mpirun) started the ranks; then rank 0's store
    is used once there is a process group. If no store answers,
    a rank takes a lost peer's failure for the first, and its own failure too.
    """

    KEY = "megatron_deepseek/failures"

    def __init__(self, store: dist.Store | None):
        self.store, self.failed_here = store, False

    def is_first(self) -> bool:
        return _answer(lambda: self._reachable_store().add(self.KEY, 1) == 1, otherwise=True)

    def is_taken(self) -> bool:
        """Return whether a rank has claimed the failure; also True when the store is gone, as its host was stopped."""
        try:
            return self._reachable_store().check([self.KEY])
        except Exception:
            return True

    def wait_until_taken(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not _answer(self.is_taken, otherwise=False):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    @contextmanager
    def watched(self, patience: float) -> Iterator[None]:
        """End this process when another rank's failure is claimed, a neighbour is gone without a word, or torchrun's
        agent has died, even if the main thread waits in a collective. `patience` is that of `guarded`.
        """
        if self.store is None:
            yield
            return
        done = threading.Event()
        ring = Ring(self.store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), patience, self.neighbour_lost)
        watch = threading.Thread(target=self._watch, args=(done, os.getppid()), daemon=True, name="failure-watch")
        ring.start()
        watch.start()
        try:
            yield
        finally:
            done.set()
            ring.stop(_END_SECONDS)
            watch.join(_END_SECONDS)  # if it waits for an agent that does not answer, launch/entry.py ends without it

    def _watch(self, done: threading.Event, agent: int) -> None:
        while not done.wait(WATCH_SECONDS):
            if os.getppid() != agent:  # killed, and a new one will start this rank again: two must not train
                _leave(1)
            if not self.is_taken() or done.is_set():
                continue
            self.tell_location()
            if not done.wait(GRACE_SECONDS):
                tell_agent("Stopped: a rank of another node failed first, and its output has the traceback")
                _leave(1)

    def neighbour_lost(self, rank: int) -> None:
        """End this process, unless `rank` or another has claimed the failure: then the watch does, with its grace."""
        if self.wait_until_taken(GRACE_SECONDS) or self.failed_here:
            return
        if self.is_first():
            line = f"Rank {rank} is gone without a traceback: it was killed, or the link to it is cut"
            _print_with_rank(f"{line}. This rank was {location() or 'in a collective'}")
            tell_agent(line)
        else:
            tell_agent("Stopped: another rank failed first, and its output has the reason")
        _leave(1)

    def tell_location(self) -> None:
        """Store where this rank's training stands, for the rank whose failure came first."""
        try:
            place = "" if self.failed_here else location()
            self._reachable_store().set(f"{self.KEY}/where/{os.environ['RANK']}", place)
        except Exception:
            pass

    def locations(self, ranks: Sequence[int], seconds: float) -> dict[int, str | None]:
        """Return the locations that `ranks` stored within `seconds`; None for a rank that stored none."""
        deadline, found = time.monotonic() + seconds, dict.fromkeys(ranks)
        while None in found.values() and time.monotonic() < deadline:
            time.sleep(0.1)
            for rank in ranks:
                if found[rank] is None and self._reachable_store().check([f"{self.KEY}/where/{rank}"]):
                    found[rank] = self._reachable_store().get(f"{self.KEY}/where/{rank}").decode()
        return found

    def _reachable_store(self) -> dist.Store:
        return self.store if self.store is not None else _get_default_store()


class OneTraceback(ErrorHandler):
    """A torch error handler that prints the traceback itself and gives torchrun's summary one line in its place."""

    def __init__(self, claim: FailureClaim):
        self.claim = claim

    def record_exception(self, e: BaseException) -> None:
        self.claim.failed_here, lost, hung = True, lost_a_peer(e), timed_out(e)
        if (lost and not hung and self.claim.wait_until_taken(GRACE_SECONDS)) or not self.claim.is_first():
            time.sleep(GRACE_SECONDS)  # torchrun's SIGTERM comes first: its summary then names the failed rank only
            return
        lines = traceback.format_exception(type(e), e, e.__traceback__.tb_next)  # not the frame of `record`
        note = "A peer died without a traceback; this rank waited for it here:\n" if lost else ""
        if hung:
            note = self._hang(e)
        _print_with_rank(note + "".join(lines))
        tell_agent(f"{type(e).__name__}: {e} (traceback above, after [rank{os.environ['RANK']}])")

    def _hang(self, error: BaseException) -> str:
        """Say in which group a collective timed out here, and which of its ranks were elsewhere."""
        group = group_of(error)
        others = [] if group is None else [rank for rank in dist.get_process_group_ranks(group)
                                           if rank != dist.get_rank()]
        answers = _answer(lambda: self.claim.locations(others, _ANSWER_SECONDS), otherwise={}) if others else {}
        where = f"; {missing_ranks(answers)}" if answers else ""
        return f"A collective of {describe_group(group)} timed out{where}. This rank waited here:\n"


def lost_a_peer(error: BaseException) -> bool:
    """Return whether `error`, or one that it was raised from, says that the other end of a connection is gone."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, dist.DistNetworkError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in PEER_LOSS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _answer(ask: Callable, otherwise):
    """Return what `ask` learns from the store; `otherwise` where the store is gone or does not answer in time."""
    answers = queue.SimpleQueue()

    def asking():
        try:
            answers.put(ask())
        except Exception:
            answers.put(otherwise)

    threading.Thread(target=asking, daemon=True, name="question").start()
    try:
        return answers.get(timeout=_STORE_SECONDS)
    except queue.Empty:
        return otherwise


def _print_with_rank(text: str) -> None:
    """Print `text` by one write, so that lines of other ranks do not fall between its lines."""
    prefix = f"[rank{os.environ['RANK']}]: "
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
