"""The engines of a job's ranks, which step together: rank 0 takes requests and gives answers, the others follow it.

Ranks of a tensor-parallel group run the same requests. Replicas (data parallelism) each run their own, and where they
share experts every rank takes part in every forward, with no tokens if it has none: so all step as often as the busiest
one. A step is: rank 0 sends what was asked since the last one to all; everyone steps; the first rank of each replica
sends its answers to rank 0.

    replicas = Replicas(engine)
    if replicas.leads:
        with replicas:
            answers = replicas.generate(prompts, parameters)
    else:
        replicas.follow()
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from megatron_deepseek.inference.engine import Engine, Prompt
from megatron_deepseek.inference.loaded_model import LoadedModel
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.inference.statistics import Statistics, total


@dataclass(frozen=True)
class _Add:
    """A request for one replica. Its parameters have a seed, so that all ranks of the replica draw alike."""

    replica: int
    prompt: tuple[int, ...]
    parameters: SamplingParameters
    request_id: str


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Close:
    """The end of the job."""


@dataclass
class _Waiting:
    """What rank 0 knows of a request: who answers it, and how many of its answers are still to come."""

    replica: int
    prompt: tuple[int, ...]
    left: int


class Replicas:
    """The engines of all ranks as one. With `stream`, steps return answers on their way too, not only finished ones."""

    def __init__(self, model: LoadedModel, settings: EngineSettings, stream: bool = False):
        layout = model.meshes.layout
        self.engine = Engine(model, settings, lockstep=layout.shares_experts)  # else experts lie within a replica
        self.layout, self.stream = layout, stream
        self.replica, self.first_of_replica = model.meshes.rank("dp"), model.meshes.rank("tp") == 0
        self._commands: list[_Add | _Abort | _Close] = []
        self._waiting: dict[str, _Waiting] = {}
        self._arrivals = 0
        self.statistics: Statistics = self.engine.statistics  # of all replicas, on rank 0 after each step

    @property
    def leads(self) -> bool:
        """Return whether this is rank 0, which alone is asked; the others must `follow`."""
        return dist.get_rank() == 0

    @property
    def has_work(self) -> bool:
        """Return whether any answer is still to come."""
        return bool(self._waiting)

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def add(self, prompt: Prompt, parameters: SamplingParameters, request_id: str | None = None,
            beside: str | None = None) -> str:
        """Let a request wait for the next step, at the replica that has least to do; return its name.

        `beside`: a request that is not yet answered, with which it can share blocks; it goes to the same replica.

        Raise ValueError for a prompt or parameters that cannot be, and for a name that is in use.
        """
        ids = self.engine.check(prompt, parameters)
        self._arrivals += 1
        request_id = request_id or f"request-{self._arrivals}"
        if request_id in self._waiting:
            raise ValueError(f"request_id {request_id!r} is in use")
        seed = random.SystemRandom().getrandbits(63) if parameters.seed is None else parameters.seed
        chosen = self._least_busy() if beside is None else self._waiting[beside].replica
        self._waiting[request_id] = _Waiting(chosen, ids, parameters.n)
        self._commands.append(_Add(chosen, ids, replace(parameters, seed=seed), request_id))
        return request_id

    def _least_busy(self) -> int:
        busy = [sum(each.left for each in self._waiting.values() if each.replica == number)
                for number in range(self.layout.dp)]
        return busy.index(min(busy))

    def abort(self, request_id: str) -> None:
        """Stop a request and free what it holds, at the next step. An unknown name is ignored."""
        if self._waiting.pop(request_id, None) is not None:
            self._commands.append(_Abort(request_id))

    def step(self) -> list[Output]:
        """Compute what comes next on all ranks, and return the answers."""
        commands, self._commands = self._commands, []
        outputs = []
        for output in self._collect(self._obey(self._send(commands))):
            waiting = self._waiting.get(output.request_id)
            if waiting is None:
                continue  # aborted
            outputs.append(replace(output, prompt=waiting.prompt))
            waiting.left -= output.finished
            if not waiting.left:
                del self._waiting[output.request_id]
        return outputs

    def generate(self, prompts: Sequence[Prompt], parameters: SamplingParameters | Sequence[SamplingParameters]
                 ) -> list[list[Output]]:
        """Return the n answers to each prompt, in order; `parameters` are for all prompts or one for each."""
        each = [parameters] * len(prompts) if isinstance(parameters, SamplingParameters) else list(parameters)
        for prompt, one in zip(prompts, each, strict=True):
            self.engine.check(prompt, one)
        names, finished = [self.add(prompt, one) for prompt, one in zip(prompts, each)], {}
        while self.has_work:
            finished |= {(output.request_id, output.index): output for output in self.step() if output.finished}
        return [[finished[name, index] for index in range(one.n)] for name, one in zip(names, each)]

    def close(self) -> None:
        """Let the other ranks leave `follow`."""
        self._send([_Close()])

    def follow(self) -> None:
        """Do what rank 0 says until it closes; for the other ranks."""
        while True:
            commands = self._send(None)
            if any(isinstance(command, _Close) for command in commands):
                return
            self._collect(self._obey(commands))

    def _send(self, commands: list | None) -> list:
        """Return rank 0's commands on every rank."""
        if self.layout.world_size == 1:
            return commands
        told = [commands]
        dist.broadcast_object_list(told)
        return told[0]

    def _obey(self, commands: list) -> list[Output]:
        """Make the engine's changes and its step; return the answers that rank 0 is to see."""
        for command in commands:
            if isinstance(command, _Add) and command.replica == self.replica:
                self.engine.add(command.prompt, command.parameters, command.request_id)
            elif isinstance(command, _Abort):
                self.engine.abort(command.request_id)
        outputs = self.engine.step()
        return [replace(output, prompt=()) for output in outputs if self.stream or output.finished]

    def _collect(self, outputs: list[Output]) -> list[Output]:
        """Return on rank 0 the answers of all replicas, and add up their counts; on other ranks nothing."""
        own = (outputs, self.engine.statistics)
        others: list[tuple | None] = []
        if self.layout.dp > 1:  # else rank 0 has all there is
            others = [None] * self.layout.world_size if self.leads else None
            dist.gather_object(own if self.first_of_replica and not self.leads else None, others)
        if not self.leads:
            return []
        of_replicas = [own, *(each for each in others if each is not None)]
        self.statistics = total([statistics for _, statistics in of_replicas])
        return [output for found, _ in of_replicas for output in found]
