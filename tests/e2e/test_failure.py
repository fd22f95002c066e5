"""What a user reads when one rank of a torchrun job fails: its traceback, once, and soon."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.distributed.run
from forked import running_script

from megatron_deepseek.runtime.failure import guarded, lost_a_peer

SCRIPT = '''
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from megatron_deepseek.runtime.failure import guarded

def read_token(step):
    raise RuntimeError(f"bad token in step {step}")

def look_away():
    time.sleep(600)

@guarded
def main(failing_rank, sleeping_rank, timeout=600, dying_rank=-1):
    dist.init_process_group("gloo")
    if dying_rank >= 0:
        dist.barrier()  # all are connected to it
    if dist.get_rank() == dying_rank:
        os.kill(os.getpid(), signal.SIGKILL)
    group = dist.new_group(group_desc="mesh_tp", timeout=timedelta(seconds=timeout))
    for step in range(10**6):
        dist.all_reduce(torch.ones(8), group=group)
        if step == 20 and dist.get_rank() == failing_rank:
            read_token(step)
        if step == 20 and dist.get_rank() == sleeping_rank:
            look_away()

main(*map(int, sys.argv[1:]))
'''


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def launch(script):
    """Starts torchrun on the script; an agent still alive at the end is told to stop, and stops its ranks."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    jobs = []

    def start(torchrun_arguments, *script_arguments):
        command = [sys.executable, "-m", "torch.distributed.run", *torchrun_arguments, script, *script_arguments]
        jobs.append(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT))
        return jobs[-1]

    yield start
    for job in jobs:
        job.terminate()
        job.communicate(timeout=60)


def ranks_with_a_traceback(output):
    return re.findall(r"^\[rank(\d)\]: Traceback", output, flags=re.MULTILINE)


def test_the_failing_rank_speaks_alone(launch):
    job = launch(["--standalone", "--nproc_per_node", "3"], "2", "-1")
    limit = threading.Timer(60, job.kill)
    limit.start()
    lines = [(time.monotonic(), line) for line in job.stdout]
    limit.cancel()
    output, said = "".join(line for _, line in lines), [at for at, line in lines if line.startswith("[rank2]")]
    assert job.wait() != 0
    assert ranks_with_a_traceback(output) == ["2"]
    assert output.count('raise RuntimeError(f"bad token in step {step}")') == 1
    assert "errors/__init__.py" not in "".join(line for line in output.splitlines() if line.startswith("[rank2]"))
    # torchrun's own summary names the cause in a line.
    assert "traceback : RuntimeError: bad token in step 20" in output
    assert time.monotonic() - said[0] < 15


def run_nodes(script: Path, number: int, *arguments: str) -> list[str]:
    """Run an agent with one rank for each node, all on this machine, and return what each printed; all must fail.

    The agents are forked with torch imported; their ranks are processes that begin with nothing.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    printed = [script.with_name(f"node {node}") for node in range(number)]
    with ExitStack() as stack:
        agents = [stack.enter_context(running_script(
            [torch.distributed.run.__file__, "--nnodes", str(number), "--node-rank", str(node), "--master-addr",
             "127.0.0.1", "--master-port", port, str(script), *arguments], out, out))[0]
            for node, out in enumerate(printed)]
        for agent in agents:
            agent.join(90)
        statuses = [agent.exitcode for agent in agents]
        for agent in agents:
            agent.terminate()  # where it is alive still, it stops its ranks
            agent.join(60)
    assert not {0, None} & set(statuses), statuses
    return [path.read_text() for path in printed]


def test_ranks_of_other_nodes_end_too(script):
    """No agent of theirs sees rank 1 fail. Rank 2 loses it in a collective; rank 0 sleeps and notices nothing."""
    outputs = run_nodes(script, 3, "1", "0")
    assert [ranks_with_a_traceback(output) for output in outputs] == [[], ["1"], []]
    assert "a rank of another node failed first" in outputs[0]


def test_a_rank_killed_while_groups_are_built_is_missed_at_once(script):
    """The others wait in the store for the address of a process that is gone, which breaks no connection of theirs."""
    outputs = run_nodes(script, 3, "-1", "-1", "600", "1")
    assert sum(output.count("Rank 1 is gone without a traceback: it was killed") for output in outputs) == 2, outputs
    assert "".join(outputs).count("This rank was in a collective") == 1


def test_a_hang_names_group_and_rank(launch):
    """Ranks 0 and 2 wait for rank 1 in vain; the one that speaks says whom they waited for, and where that one is."""
    begun = time.monotonic()
    job = launch(["--standalone", "--nproc_per_node", "3"], "-1", "1", "3")
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0 and len(ranks_with_a_traceback(output)) <= 1, output
    assert "A collective of the group tp (all ranks 0, 1, 2) timed out; rank 1 is in no collective but in look_away " \
        "(script.py, line 12). This rank waited here:" in output, output
    assert time.monotonic() - begun < 30


def test_without_a_launcher_errors_are_pythons(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    @guarded
    def main(value):
        raise KeyError(value)

    with pytest.raises(KeyError, match="seq_length"):
        main("seq_length")


def test_lost_peers_are_told_from_own_mistakes():
    closed = RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:50076")
    wrapped = RuntimeError("stage 1 failed")
    wrapped.__cause__ = closed
    assert lost_a_peer(closed) and lost_a_peer(wrapped) and lost_a_peer(dist.DistNetworkError("timed out"))
    assert not lost_a_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_a_peer(ValueError("Connection closed by peer"))
