"""Jobs of the fault drill: life after life, each ended by a death or met by a hardship, and how they compare."""

import ctypes
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from hardships import Damage, FullDisk, JobFiles, NoPermission, mount_disk, unmount_disk
from mortal import Death, obituary, train, write_plan
from workshop import REPOSITORY, Workshop

from megatron_deepseek.checkpoint.integrity import verify_directory
from megatron_deepseek.checkpoint.tracker import (
    begins_anew,
    find_iteration,
    iterations,
    last_iteration,
    leftovers,
    problem,
)

RANKS, KEEP = 2, 2
LAYOUTS = {"dp": (), "tp": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
           "pp": ("--pipeline-model-parallel-size", "2"), "ep": ("--expert-model-parallel-size", "2"),
           "cp": ("--context-parallel-size", "2")}
SAVES = {"sync": (), "async": ("--async-save",)}
TIMES = ("step_seconds", "tokens_per_second", "checkpoint_stall_seconds")
ORPHAN_SECONDS = 10.0  # in which the ranks of a killed agent must be gone
HANG_SECONDS = 120.0  # after which a life counts as one that hangs
STEPS_OF_A_LIFE = 3  # after whose next multiple a life leaves that is not the last: others shall have something to do


@dataclass(frozen=True)
class AgentDeath:
    """torchrun's agent is killed so many milliseconds after it was started."""

    milliseconds: int

    def __str__(self) -> str:
        return f"agent after {self.milliseconds} ms"


Ending = Death | FullDisk | NoPermission | Damage | AgentDeath


@dataclass(frozen=True)
class Drill:
    """One job: which layout and kind of save, and what each of its lives but the last meets."""

    name: str
    layout: str
    saves: str
    iterations: int
    endings: tuple[Ending, ...] = ()

    def files(self, workshop: Workshop) -> JobFiles:
        return JobFiles(workshop.directory / self.name)

    def log(self, workshop: Workshop) -> Path:
        return workshop.directory / f"{self.name}.log"

    def arguments(self, workshop: Workshop) -> list[str]:
        files = self.files(workshop)
        return workshop.arguments(str(files.save), "--train-iters", str(self.iterations), "--global-batch-size", "4",
                                  "--save-interval", "1", "--keep-last", str(KEEP), "--load", str(files.save),
                                  "--data-cache-path", str(files.cache), "--save-hf", str(files.export),
                                  *LAYOUTS[self.layout], *SAVES[self.saves])


@dataclass
class Story:
    """What came about in a job, and what was wrong."""

    met: list[Ending] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@contextmanager
def own_disk(files: JobFiles) -> Iterator[bool]:
    """A disk for the job alone, small and in memory, where that is allowed; a directory elsewhere."""
    mounted = mount_disk(files.disk)
    try:
        yield mounted
    finally:
        if mounted:
            unmount_disk(files.disk)


def run_forked(drill: Drill, workshop: Workshop) -> Story:
    """Every life forked from here, where everything is imported; output goes to NAME.log."""
    files, plan, log = drill.files(workshop), workshop.directory / f"{drill.name}.json", drill.log(workshop)
    story = Story()
    for number, ending in enumerate((*drill.endings, None)):
        begun = log.stat().st_size if log.exists() else 0
        death = ending if isinstance(ending, Death) else None
        if death is not None and death.what == "cache":
            shutil.rmtree(files.cache, ignore_errors=True)  # anybody may, and it is made again
        more = () if ending is None or (death and death.what == "export") else ("--exit-interval", str(STEPS_OF_A_LIFE))
        with nullcontext(False) if ending is None or death else ending.upon(files) as troubled:
            statuses = run_life([*drill.arguments(workshop), *more], death, obituary(plan, number), log)
        died = obituary(plan, number).exists()
        story.met += [ending] * (died or troubled)
        if troubled:
            story.wrong += unforgiven(ending, statuses, log.read_text(errors="replace")[begun:])
        elif not died and statuses != [0] * RANKS:
            story.wrong.append(f"ended by itself, statuses {statuses}")
        story.wrong += [f"afterwards {text}" for text in damage(files.save)]
        if story.wrong:
            story.wrong = [f"life {number} ({ending}): {text}" for text in story.wrong]
            break
    return story


def unforgiven(ending: FullDisk | NoPermission | Damage, statuses: list[int], output: str) -> list[str]:
    """How a life that met `ending` went otherwise than it should: on, or to an end in one line."""
    own = [status for status in statuses if status >= 0] or statuses  # the other rank was stopped by the drill
    wrong = [] if ending.forgives(max(own)) else [f"statuses {statuses}"]
    if "Traceback" in output:
        wrong.append("a traceback")
    if any(own) and ": error: " not in output:
        wrong.append(f"statuses {statuses} without a line that says why")
    return wrong


def damage(root: Path) -> list[str]:
    """Why the next life could not load what this one left behind."""
    if begins_anew(root):
        return []
    if problem(root) is not None:
        return [problem(root)]
    return list(map(str, verify_directory(find_iteration(root, last_iteration(root)))))


def run_life(arguments: list[str], death: Death | None, obituary: Path, log: Path) -> list[int]:
    """Exit statuses of the ranks, which are stopped once one has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, port, arguments, death, obituary, log))
             for rank in range(RANKS)]
    for process in ranks:
        process.start()
    running = list(ranks)
    while running:
        ended = wait([process.sentinel for process in running], timeout=HANG_SECONDS)
        for process in running:
            if process.sentinel in ended:
                process.join()  # its pipe closes a moment before it is gone
        running = [process for process in running if process.sentinel not in ended]
        if not ended:
            with open(log, "a") as file:
                file.write(f"the drill: {len(running)} ranks have not ended for {HANG_SECONDS:.0f} s and are killed\n")
        if any(process.exitcode for process in ranks) or not ended:
            _stop(running, bool(ended) and death is not None and death.merciful)
            running = []
    return [process.exitcode for process in ranks]


def _stop(processes: list, merciful: bool) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGTERM if merciful else signal.SIGKILL)
    for process in processes:
        process.join(timeout=30)
        if process.is_alive():
            process.kill()
            process.join()


def _rank(rank: int, port: int, arguments: list[str], death: Death | None, obituary: Path, log: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(RANKS)}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    obey_modes()
    torch.set_num_threads(1)
    train(arguments, death, obituary)


def obey_modes() -> None:
    """Give up root's right to write where a directory's mode forbids it (CAP_DAC_OVERRIDE; Linux)."""
    if not sys.platform.startswith("linux") or os.geteuid():
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable of the first 32, then of the others
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110  # and CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h


def run_torchrun(drill: Drill, workshop: Workshop) -> Story:
    """torchrun starts all ranks anew when one has died; where its agent is killed, somebody starts it again."""
    plan, story = workshop.directory / f"{drill.name}.json", Story()
    deaths = [ending for ending in drill.endings if isinstance(ending, Death)]
    agents = [ending for ending in drill.endings if isinstance(ending, AgentDeath)]
    write_plan(plan, deaths)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS),
               "--max-restarts", str(len(deaths) + 1), "--monitor-interval", "0.1",
               str(Path(__file__).with_name("mortal.py")), str(plan), *drill.arguments(workshop)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    with open(drill.log(workshop), "a") as log:
        for ending in agents:
            agent = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            status = _kill_agent(agent, ending, story)
            story.wrong += [f"after {ending}: {text}" for text in damage(drill.files(workshop).save)]
            if status == 0 or story.wrong:
                return story
        status = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    story.met += [death for number, death in enumerate(deaths) if obituary(plan, number).exists()]
    story.wrong += [f"torchrun ended with status {status}"] if status else []
    return story


def _kill_agent(agent: subprocess.Popen, ending: AgentDeath, story: Story) -> int | None:
    """Its status if it ended before; else its ranks must be gone soon after it."""
    try:
        return agent.wait(ending.milliseconds / 1000)
    except subprocess.TimeoutExpired:
        family = descendants(agent.pid)
        agent.kill()
        agent.wait()
    story.met.append(ending)
    deadline = time.monotonic() + ORPHAN_SECONDS
    while any(map(is_alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in family if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    story.wrong += [f"{ending}: {len(left)} of its {len(family)} processes went on for {ORPHAN_SECONDS:.0f} s"] * bool(
        left)
    return None


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read by DCP itself."""
    stored = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no job
        dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state


def differences(files: JobFiles, undisturbed: JobFiles, iteration: int) -> list[str]:
    """How what a job left differs from what one that nothing happened to left."""
    if last_iteration(files.save) != iteration:
        return [f"ended at iteration {last_iteration(files.save)} instead of {iteration}"]
    wrong = damage(files.save)
    if iterations(files.save) != iterations(undisturbed.save) or leftovers(files.save):
        wrong.append(f"{files.save} holds {sorted(path.name for path in files.save.iterdir())}")
    ours, theirs = (tensors(find_iteration(each.save, iteration)) for each in (files, undisturbed))
    assert len(theirs) > 100, "an empty reference proves nothing"
    wrong += [f"{name} has other bits, or is not there" for name in ours.keys() | theirs.keys()
              if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])]
    return wrong + different_metrics(files.save, undisturbed.save) + different_exports(files, undisturbed)


def different_metrics(root: Path, undisturbed: Path) -> list[str]:
    ours, theirs = (_records(each / "metrics.jsonl") for each in (root, undisturbed))
    if len(ours) != len(theirs):
        return [f"metrics.jsonl has {len(ours)} lines instead of {len(theirs)}"]
    return [f"metrics.jsonl, line {number}: {own} instead of {other}"
            for number, (own, other) in enumerate(zip(ours, theirs), start=1) if own != other]


def _records(path: Path) -> list[dict]:
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES}
            for line in path.read_text().splitlines()]


def different_exports(files: JobFiles, undisturbed: JobFiles) -> list[str]:
    ours, theirs = (_digests(each.export) for each in (files, undisturbed))
    assert theirs, "the reference has no export"
    return [f"the export's {name} has other bytes, or is not there" for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)]


def _digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*") if path.is_file()}
