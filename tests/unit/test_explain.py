"""The printed layout against the arithmetic of meshes and pipelines; the page of what goes with what, its table."""

from pathlib import Path

import pytest
import torch

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.explain import compatibility, explain, explain_layout, goes_with_what, places
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.schedule_rules import V_SHAPED, stages_of_rank
from megatron_deepseek.parallel.schedule_rules import SCHEDULES

LAYOUT = Layout(dp=2, pp=2, tp=2, cp=2, ep=4)
COMMAND = ("--model tiny --data-path corpus --train-iters 10 --seq-length 256 --pipeline-model-parallel-size 2 "
           "--context-parallel-size 2 --expert-model-parallel-size 2 --global-batch-size 8").split()


def test_places_are_those_of_the_meshes():
    """init_device_mesh lays ranks out row by row."""
    dense = torch.arange(16).view(LAYOUT.pp, LAYOUT.dp, LAYOUT.cp, LAYOUT.tp)
    expert = torch.arange(16).view(LAYOUT.pp, LAYOUT.edp, LAYOUT.ep, LAYOUT.etp)
    for rank in range(16):
        own, routed = places(rank, LAYOUT)
        assert dense[own["pp"], own["dp"], own["cp"], own["tp"]] == rank
        assert expert[routed["pp"], routed["edp"], routed["ep"], routed["etp"]] == rank


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_are_those_of_the_pipeline(schedule):
    for pp, virtual in ((2, 1), (2, 2), (4, 2), (4, 3)):
        for rank in range(pp):
            v_shaped = schedule in V_SHAPED and virtual == 2
            held = [rank, 2 * pp - 1 - rank] if v_shaped else list(range(rank, pp * virtual, pp))
            assert stages_of_rank(rank, pp * virtual, pp, schedule) == held


def test_explains_every_rank():
    lines = list(explain(parse(COMMAND, 8)))
    assert "8 ranks: dense mesh pp 2 x dp 2 x cp 2 x tp 1, expert mesh pp 2 x edp 2 x ep 2 x etp 1" == lines[0]
    assert [int(line.split()[0]) for line in lines[3:]] == list(range(8))
    assert lines[3].endswith("0, 3 of 4") and lines[4].endswith("1, 2 of 4")


def test_a_stage_without_a_layer_of_experts_holds_none():
    layout = "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout E|t|ttt|mL --global-batch-size 4"
    lines = list(explain(parse([*"--model tiny --data-path corpus --train-iters 1".split(), *layout.split()], 4)))
    assert [line.split()[9] for line in lines[3:]] == ["none", "none", "0-15", "0-15"]


def test_marks_what_the_run_uses():
    marked = {line.split("*")[0].strip() for line in goes_with_what(parse(COMMAND, 8)) if "*" in line.split("  ")[0]
              or "*" in line[30:36]}
    names = {line.split(maxsplit=1)[1] for line in marked if line[:1].isdigit()}
    assert names == {"data parallel", "context parallel, ring", "expert parallel, alltoall", "1F1B",
                     "several micro-batches", "router noaux_tc", "shared experts", "MTP", "MTP before the last stage"}


def test_command_prints_and_leaves(capsys):
    with pytest.raises(SystemExit) as left:
        explain_layout([*COMMAND, "--explain-layout", "8"])
    printed = capsys.readouterr().out
    assert left.value.code == 0 and "8 ranks" in printed and "what goes with what" in printed
    explain_layout(COMMAND)


def test_page_is_rendered_from_the_table():
    page = Path(__file__).parents[2] / "docs" / "compatibility.md"
    assert page.read_text() == compatibility(), "run python -m megatron_deepseek.arguments.explain"
