"""Two nodes, which are network namespaces of this machine: one's launcher is killed and comes back; their link is cut.

The traffic stays between the two. Needs root and iproute2, and is skipped where namespaces cannot be made.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_faults import wait_for_steps
from workshop import REPOSITORY

from megatron_deepseek.checkpoint.tracker import last_iteration

pytestmark = pytest.mark.slow
LAUNCH = str(REPOSITORY / "tools" / "launch.py")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Nodes:
    """Namespaces 0 and 1 with addresses 10.77.0.1 and .2, and what runs in them."""

    def __init__(self, workshop, directory: Path):
        self.workshop, self.directory, self.jobs = workshop, directory, {}
        self.spaces = [f"nodes-{os.getpid()}-{node}" for node in range(2)]
        self.links = [f"n{os.getpid()}-{node}" for node in range(2)]

    def build(self) -> None:
        for space in self.spaces:
            ip("netns", "add", space)
        ip("link", "add", self.links[0], "netns", self.spaces[0], "type", "veth", "peer", "name", self.links[1],
           "netns", self.spaces[1])
        for node, (space, link) in enumerate(zip(self.spaces, self.links)):
            ip("-n", space, "addr", "add", f"10.77.0.{node + 1}/24", "dev", link)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", link, "up")

    def remove(self) -> None:
        for job in self.jobs.values():
            job.kill()  # its rank goes with it
            job.wait()
        for space in self.spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)

    def start(self, node: int, save: str, launcher: tuple[str, ...], *arguments: str) -> None:
        """One rank on `node`; what it says is added to NODE.log."""
        self.run(node, launcher, (REPOSITORY,), str(REPOSITORY / "pretrain_deepseek.py"),
                 *self.workshop.arguments(save, "--load", str(self.workshop.directory / save), "--save-interval", "1",
                                          "--keep-last", "2", "--eval-iters", "0", *arguments))

    def run(self, node: int, launcher: tuple[str, ...], paths: tuple[Path, ...], *program: str) -> None:
        """`program` as one rank on `node`, with modules from `paths`."""
        command = ["ip", "netns", "exec", self.spaces[node], sys.executable, *launcher, "--nnodes", "2", "--node-rank",
                   str(node), "--master-addr", "10.77.0.1", "--master-port", "29511", "--nproc_per_node", "1", *program]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1",
                   "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": self.links[node]}
        with open(self.directory / f"{node}.log", "a") as log:
            self.jobs[node] = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT)

    def wait(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        return [self.jobs[node].wait(max(0.1, deadline - time.monotonic())) for node in range(2)]

    def said(self) -> list[str]:
        return [(self.directory / f"{node}.log").read_text() for node in range(2)]


@pytest.fixture
def nodes(workshop, tmp_path):
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root, and ip of iproute2")
    made = Nodes(workshop, tmp_path)
    try:
        made.build()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}")
    yield made
    made.remove()


def test_the_launcher_that_holds_the_store_is_killed_and_comes_back(nodes):
    """Then the other one has nobody to meet any more: it begins anew, and the run goes on from its last checkpoint."""
    launcher = (LAUNCH, "--relaunch", "2", "--max-restarts", "3")
    for node in range(2):
        nodes.start(node, "back", launcher, "--train-iters", "12")
    wait_for_steps(nodes.workshop, "back")
    nodes.jobs[0].kill()
    nodes.jobs[0].wait()
    time.sleep(3)
    nodes.start(0, "back", launcher, "--train-iters", "12")
    assert nodes.wait(240) == [0, 0], nodes.said()
    assert last_iteration(nodes.workshop.directory / "back") == 12
    assert [line["iteration"] for line in nodes.workshop.metrics("back")] == list(range(1, 13))
    assert "launch.py: beginning anew, 1 more times at most" in nodes.said()[1]


def test_nobody_remains_when_the_link_is_cut_for_good(nodes):
    """Neither side hears anything of the other, nor one of them of the store. A collective may take 15 s."""
    for node in range(2):
        nodes.start(node, "cut", (LAUNCH,), "--train-iters", "100000", "--distributed-timeout-minutes", "0.25")
    wait_for_steps(nodes.workshop, "cut")
    ip("-n", nodes.spaces[0], "link", "set", nodes.links[0], "down")
    assert 0 not in nodes.wait(120), nodes.said()
    for node, said in enumerate(nodes.said()):
        assert "the link to it is cut" in said or "timed out" in said, said
        assert said.splitlines()[-1].startswith("launch.py: "), said


def test_weights_get_to_an_engine_over_both_nodes(nodes):
    """Pipeline stages on two nodes, whose engine has half of each layer on both: by torchrun."""
    helpers = REPOSITORY / "tests" / "helpers"
    for node in range(2):
        nodes.run(node, ("-m", "torch.distributed.run"), (REPOSITORY, helpers, helpers / "ranks"),
                  str(helpers / "ranks" / "rollout_job.py"))
    assert nodes.wait(240) == [0, 0], nodes.said()
    assert all("log-probabilities differ by at most" in said for said in nodes.said())
