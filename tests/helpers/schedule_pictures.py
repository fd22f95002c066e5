"""Pipeline schedules as docs/architecture.md shows them: the named steps, torch's own lists of actions, and a picture.

A block of the page is the name of a schedule, a line for each of its steps (number, name, how often, actions), and the
picture. The steps are those of megatron_deepseek/planning/actions.py, whose lists a test compares with torch's. The
picture is made here, from torch's list for RANKS ranks and MICRO_BATCHES micro-batches:

    python tests/helpers/schedule_pictures.py      prints every block with its picture made again
"""

import dataclasses
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, _Action, get_schedule_class

from megatron_deepseek.parallel.schedule_rules import SCHEDULES, VIRTUAL_STAGES, stages_of_rank
from megatron_deepseek.planning.actions import Act, Run, numbered_actions, place_of
from megatron_deepseek.planning.simulation import simulate

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
RANKS, MICRO_BATCHES = 2, 4
UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}
CELL = 3  # characters of a unit


@dataclass(frozen=True)
class PageStep:
    """A line of a block. `count` is an expression in p, r, m, q, and c of the first step."""

    number: int
    name: str
    count: str
    actions: tuple[str, ...]

    def count_of(self, schedule: str, pp: int, micro_batches: int, rank: int) -> int:
        """Return what the expression comes to for a rank that has as many stages as the page shows."""
        place = dataclasses.asdict(place_of(schedule, pp, VIRTUAL_STAGES[schedule], micro_batches, rank))
        return int(eval(self.count, {"__builtins__": {}}, place | {"min": min}))


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


def torch_acts(schedule: str, pp: int, micro_batches: int, virtual_stages: int | None = None) -> list[list[Act]]:
    """Return what torch has each rank of `pp` do, in its order, without waiting, sending and reducing.

    Schedules of several stages on a rank run their `pipeline_order`. Those of one do not, and 1F1B's is wrong for the
    last rank (torch 2.13: it begins with micro-batch 1), so they are run, on stages that only record.
    """
    total = pp * (virtual_stages or VIRTUAL_STAGES[schedule])
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


def timeline(schedule: str, acts: list[list[Act]]) -> tuple[list[list[tuple[int, int]]], int]:
    """Return (start, end) of each act of each rank in units, and the end of all: each begins as soon as its rank is
    free and what it needs has been made. A stage of a schedule with one on each rank is twice as long as another.
    """
    scale, last = 2 // VIRTUAL_STAGES[schedule], len(acts) * VIRTUAL_STAGES[schedule] - 1
    spans = simulate(acts, lambda _, act: scale * sum(UNITS[run.kind] for run in act), last)
    return [[(int(span.start), int(span.end)) for span in own] for own in spans], int(max(
        own[-1].end for own in spans))


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


def picture(schedule: str) -> list[str]:
    """Return the lines under the steps of a block: two for each rank, what it does and in which step, and the sums."""
    total = RANKS * VIRTUAL_STAGES[schedule]
    acts = torch_acts(schedule, RANKS, MICRO_BATCHES)
    spans, end = timeline(schedule, acts)
    lines = []
    for rank, own in enumerate(acts):
        first = stages_of_rank(rank, total, RANKS, schedule)[0]
        planned = numbered_actions(schedule, RANKS, VIRTUAL_STAGES[schedule], MICRO_BATCHES, rank)
        numbers = [number for number, _ in planned]
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


def steps_of(lines: list[str]) -> list[PageStep]:
    """Return the steps of a block."""
    rows = [re.split(r" {2,}", line.strip()) for line in lines if re.match(r"  \d+  ", line)]
    return [PageStep(int(number), name, count, tuple(actions.split())) for number, name, count, actions in rows]


if __name__ == "__main__":
    for schedule_name, block in blocks(PAGE.read_text()).items():
        said = [line for line in block if line is block[0] or re.match(r"  \d+  ", line)]
        print("```", *said, *picture(schedule_name), "```", sep="\n")
