"""Pipeline schedules as docs/architecture.md shows them: the named steps, torch's own lists of actions, and a picture.

A block of the page is the name of a schedule, a line for each of its steps (number, name, how often, actions), and the
picture. The steps are the page's own: `expand` makes of them what a rank does, which a test compares with torch. The
picture is made here, from torch's list for RANKS ranks and MICRO_BATCHES micro-batches:

    python tests/helpers/schedule_pictures.py      prints every block with its picture made again
"""

import re
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, _Action, get_schedule_class

from megatron_deepseek.parallel.schedule_rules import SCHEDULES, VIRTUAL_STAGES, stages_of_rank

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
RANKS, MICRO_BATCHES = 2, 4
UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}
CELL = 3  # characters of a unit


@dataclass(frozen=True)
class Run:
    """A forward (F), whole backward (B), or the input (I) or weight (W) gradients of a micro-batch on a stage."""

    kind: str
    stage: int
    micro_batch: int


Act = tuple[Run, ...]  # one, or the two of a pair


@dataclass(frozen=True)
class Step:
    """`count` is an expression in p, r, m, q, and c of the first step; `actions` are those of `expand`."""

    number: int
    name: str
    count: str
    actions: tuple[str, ...]


class RecordingStage(SimpleNamespace):
    """What schedules of torch.distributed.pipelining ask of a stage; it computes and sends nothing."""

    def __init__(self, index: int, total: int, pp: int):
        super().__init__(stage_index=index, num_stages=total, group_size=pp, group_rank=0, group=None, device="cpu",
                         has_backward=True, is_first=index == 0, is_last=index == total - 1, submod=None,
                         stage_index_to_group_rank=None, acts=[])

    def forward_one_chunk(self, number: int, *_, **__) -> None:
        self.acts.append((Run("F", self.stage_index, number),))

    def backward_one_chunk(self, number: int, *_, **__) -> None:
        self.acts.append((Run("B", self.stage_index, number),))

    def no_operations(self, number: int) -> list:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_operations

    def perform_reduce_grad(self, factor: int) -> None:
        pass

    def clear_runtime_states(self) -> None:
        pass


def torch_acts(schedule: str, pp: int, micro_batches: int) -> list[list[Act]]:
    """Return what torch has each rank of `pp` do, in its order, without waiting, sending and reducing.

    Schedules of several stages on a rank run their `pipeline_order`. Those of one do not, and 1F1B's is wrong for the
    last rank (torch 2.13: it begins with micro-batch 1), so they are run, on stages that only record.
    """
    total = pp * VIRTUAL_STAGES[schedule]
    kind = get_schedule_class(schedule)
    if issubclass(kind, PipelineScheduleSingle):
        return [_recorded(kind, RecordingStage(rank, total, pp), micro_batches) for rank in range(pp)]
    stages = [RecordingStage(index, total, pp) for index in stages_of_rank(0, total, pp, schedule)]
    order = kind(stages, micro_batches, loss_fn=lambda output, target: 0).pipeline_order
    acts = [[_act(action) for action in order[rank] if action is not None] for rank in range(pp)]
    return [[act for act in of_rank if act] for of_rank in acts]


def _recorded(kind: type[PipelineScheduleSingle], stage: RecordingStage, micro_batches: int) -> list[Act]:
    schedule = kind(stage, micro_batches, loss_fn=lambda output, target: 0, scale_grads=False)
    schedule._initialize_stage = lambda *_: None  # noqa: SLF001 (torch's, which would ask for process groups)
    schedule.step(target=torch.zeros(micro_batches), return_outputs=False)
    return stage.acts


def _act(action: _Action) -> Act:
    runs = action.sub_actions or (action,)
    return tuple(Run(run.computation_type.value, run.stage_index, run.microbatch_index) for run in runs
                 if run.computation_type.value in UNITS)


def expand(schedule: str, steps: list[Step], pp: int, micro_batches: int, rank: int) -> list[tuple[int, Act]]:
    """Return (number of the step, act) of all that `rank` does by `steps`.

    F, B, I, W are of the rank's first stage, f, b, i, w of its second; each takes that stage's next micro-batch, those
    with an arrow from the last one down. "F+b" is a pair. "F/f" takes turns, of q where schedules interleave, and the
    stage named first begins; "W/w" is the weight gradients that have waited longest.
    """
    held = stages_of_rank(rank, pp * VIRTUAL_STAGES[schedule], pp, schedule)
    rounds = micro_batches // max(1, micro_batches // pp) if schedule.startswith("Interleaved") else 1
    names = {"p": pp, "r": rank, "m": max(micro_batches, 2 * pp - 1) if schedule == "ZBVZeroBubble" else micro_batches,
             "q": rounds, "min": min}
    done, turns, waiting = Counter(), Counter(), deque()

    def run(token: str) -> Run:
        if token == "W/w":
            return Run("W", *waiting.popleft())
        if "/" in token:
            turns[token[0] in "Ff"] += 1
            token = token.split("/")[(turns[token[0] in "Ff"] - 1) // rounds % 2]
        stage, kind = held[token[0].islower()], token[0].upper()
        number = done[stage, "B" if kind == "I" else kind]
        done[stage, "B" if kind == "I" else kind] += 1
        micro_batch = names["m"] - 1 - number if token.endswith("↓") else number
        if kind == "I":
            waiting.append((stage, micro_batch))
        elif kind == "W":
            waiting.remove((stage, micro_batch))
        return Run(kind, stage, micro_batch)

    made = []
    for step in steps:
        count = int(eval(step.count, {"__builtins__": {}}, names))
        names.setdefault("c", count)
        for _ in range(count):
            made += [(step.number, tuple(map(run, action.split("+")))) for action in step.actions]
    return [(number, act) for number, act in made if act[0].micro_batch < micro_batches]


def timeline(schedule: str, acts: list[list[Act]]) -> tuple[list[list[tuple[int, int]]], int]:
    """Return (start, end) of each act of each rank in units, and the end of all: each begins as soon as its rank is
    free and what it needs has been made. A stage of a schedule with one on each rank is twice as long as another.
    """
    scale, last = 2 // VIRTUAL_STAGES[schedule], len(acts) * VIRTUAL_STAGES[schedule] - 1
    ended: dict[Run, int] = {}
    spans: list[list[tuple[int, int]]] = [[] for _ in acts]
    while any(len(spans[rank]) < len(own) for rank, own in enumerate(acts)):
        before = len(ended)
        for rank, own in enumerate(acts):
            for act in own[len(spans[rank]):]:
                needed = [ended.get(each) for run in act for each in _needs(run, last, ended)]
                if None in needed:
                    break
                start = max([spans[rank][-1][1] if spans[rank] else 0, *needed])
                end = start + scale * sum(UNITS[run.kind] for run in act)
                spans[rank].append((start, end))
                ended |= {run: end for run in act}
        assert len(ended) > before, (schedule, "waits for ever")
    return spans, max(own[-1][1] for own in spans)


def _needs(run: Run, last: int, ended: dict[Run, int]) -> list[Run]:
    """Return what `run` needs of another stage; of its own, its rank's order sees to it. A backward needs the later
    stage's whole one or its input gradients, whichever there is.
    """
    if run.kind == "F":
        return [Run("F", run.stage - 1, run.micro_batch)] if run.stage else []
    if run.kind == "W" or run.stage == last:
        return []
    whole = Run("B", run.stage + 1, run.micro_batch)
    return [whole if whole in ended else Run("I", run.stage + 1, run.micro_batch)]


def held_at_most(schedule: str, acts: list[Act], spans: list[tuple[int, int]]) -> int:
    """Return for how many forwards, in units, a rank keeps what their backward needs, at most, at the same time."""
    changes: dict[tuple[int, int], int] = defaultdict(int)
    for act, (start, end) in zip(acts, spans, strict=True):
        for run in act:
            if run.kind == "F":
                changes[start, 1] += 2 // VIRTUAL_STAGES[schedule]
            elif run.kind in "BW":
                changes[end, 0] -= 2 // VIRTUAL_STAGES[schedule]
    most = now = 0
    for moment in sorted(changes):
        now += changes[moment]
        most = max(most, now)
    return most


def picture(schedule: str, steps: list[Step]) -> list[str]:
    """Return the lines under the steps of a block: two for each rank, what it does and in which step, and the sums."""
    total = RANKS * VIRTUAL_STAGES[schedule]
    acts = torch_acts(schedule, RANKS, MICRO_BATCHES)
    spans, end = timeline(schedule, acts)
    lines = []
    for rank, own in enumerate(acts):
        first = stages_of_rank(rank, total, RANKS, schedule)[0]
        numbers = [number for number, _ in expand(schedule, steps, RANKS, MICRO_BATCHES, rank)]
        cells, below = [".".ljust(CELL)] * end, [" " * CELL] * end
        for act, (start, stop), number in zip(own, spans[rank], numbers, strict=True):
            label = "+".join((run.kind if run.stage == first else run.kind.lower()) + str(run.micro_batch)
                             for run in act)
            width = CELL * (stop - start)
            cells[start:stop] = [label.ljust(width - 1, "-") + " ", *[""] * (stop - start - 1)]
            below[start:stop] = [str(number).ljust(width), *[""] * (stop - start - 1)]
        lines += [f"rank {rank}  {''.join(cells)}".rstrip(), f"  step  {''.join(below)}".rstrip()]
    idle = [end - sum(stop - start for start, stop in own) for own in spans]
    held = [held_at_most(schedule, *each) for each in zip(acts, spans)]
    return [*lines, f"{end} units, idle {_numbers(idle)}, held {_numbers(held)}"]


def _numbers(of_ranks: list[int]) -> str:
    return " and ".join(map(str, of_ranks))


def blocks(page: str) -> dict[str, list[str]]:
    """Return the lines of each block of `page` whose first word is the name of a schedule."""
    found = [text.splitlines() for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S)
             if not language and text.split()]
    return {lines[0].split()[0]: lines for lines in found if lines[0].split()[0] in SCHEDULES}


def steps_of(lines: list[str]) -> list[Step]:
    """Return the steps of a block."""
    rows = [re.split(r" {2,}", line.strip()) for line in lines if re.match(r"  \d+  ", line)]
    return [Step(int(number), name, count, tuple(actions.split())) for number, name, count, actions in rows]


if __name__ == "__main__":
    for schedule_name, block in blocks(PAGE.read_text()).items():
        said = [line for line in block if line is block[0] or re.match(r"  \d+  ", line)]
        print("```", *said, *picture(schedule_name, steps_of(block)), "```", sep="\n")
