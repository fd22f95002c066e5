"""How an entry's process ends: whole when its agent does not answer, at once when its agent is killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_deepseek.launch import agent

REPOSITORY = Path(__file__).parents[2]

FINISHES = """
import atexit, os, sys, time
from datetime import timedelta
import torch.distributed as dist
from megatron_deepseek.launch.entry import run
from megatron_deepseek.runtime.failure import FailureClaim

class Late:
    def __del__(self, write=os.write, sleep=time.sleep):  # when threads come back to nothing
        write(1, b"interpreter ends\\n")
        sleep(2)

late = Late()

def main():
    atexit.register(print, "atexit", flush=True)
    store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, wait_for_workers=False)
    with FailureClaim(store).watched(600.0):
        print("ready", flush=True)
        sys.stdin.readline()

run("finishes.py", main)
"""


class SlowAgent:
    """A store behind a relay that, once told, keeps its answers back."""

    def __init__(self):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False,
                                   timeout=timedelta(seconds=60))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.asked, self.answering = threading.Event(), threading.Event()
        self.answering.set()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        client, _ = self.listener.accept()
        server = socket.create_connection(("127.0.0.1", self.store.port))
        threading.Thread(target=self._relay, args=(client, server, self._note), daemon=True).start()
        self._relay(server, client, self.answering.wait)

    def _note(self):
        if not self.answering.is_set():
            self.asked.set()

    @staticmethod
    def _relay(source, target, before):
        try:
            while data := source.recv(65536):
                before()
                target.sendall(data)
        except OSError:
            pass


def test_ends_whole_while_the_agent_does_not_answer(monkeypatch):
    """The watch is inside the store when the interpreter goes away, and the answer comes then."""
    slow = SlowAgent()
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RANK": "0", "WORLD_SIZE": "1"}
    process = subprocess.Popen([sys.executable, "-c", FINISHES, str(slow.port)], env=environ, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    slow.answering.clear()
    assert slow.asked.wait(60)
    process.stdin.write("\n")
    process.stdin.flush()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "interpreter ends\n":
            slow.answering.set()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, lines, errors) == (0, ["atexit\n"], "")


AGENT = """
import mmap, subprocess, sys, time
with open(sys.argv[1]) as file:
    library = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)  # as of a process that has torch loaded
    rank = subprocess.Popen([sys.executable, "-c", sys.argv[2]], start_new_session=True)
    print(rank.wait(), flush=True)
"""
RANK = """
import time
from megatron_deepseek.launch.agent import end_with_agent
end_with_agent()
print("ready", flush=True)
time.sleep(600)  # as in its imports
"""


def start_agent(library: Path) -> subprocess.Popen:
    library.write_text("nothing")
    return subprocess.Popen([sys.executable, "-c", AGENT, str(library), RANK], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TORCHELASTIC_RUN_ID": "1"})


def test_a_rank_dies_with_its_agent_even_while_it_starts(tmp_path):
    parent = start_agent(tmp_path / "libtorch.so")
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGKILL)
    assert parent.communicate(timeout=60)[0] == ""  # the rank had the other end of the pipe


def test_a_rank_that_finds_its_agent_dead_leaves(tmp_path):
    """Whoever adopted it has no torch."""
    parent = start_agent(tmp_path / "libc.so")
    assert parent.communicate(timeout=60)[0] == "1\n"


def test_a_parent_that_may_not_be_looked_into_is_known_by_its_command(monkeypatch):
    """As init's memory map, which is another user's."""
    monkeypatch.setattr(agent.os, "getsid", lambda _: os.getpid())
    command = [b"/sbin/init\0"]

    def read(path):
        if path.name == "maps":
            raise PermissionError(path)
        return command[0]

    monkeypatch.setattr(agent.Path, "read_bytes", read)
    assert agent.is_orphan(1)
    command[0] = b"/opt/conda/bin/python\0-m\0accelerate.commands.launch\0"
    assert not agent.is_orphan(1)
    command[0] = b""  # a kernel's thread, or gone
    assert not agent.is_orphan(1)
