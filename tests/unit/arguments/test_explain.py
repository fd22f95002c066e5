"""The printed layout against the arithmetic of meshes and pipelines; the page of what goes with what, its table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.explain import compatibility, explain, explain_layout, goes_with_what
from megatron_deepseek.arguments.explain_ranks import places
from megatron_deepseek.planning.words import in_short
from megatron_deepseek.launch.ending import BROKEN_PIPE
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.schedule_rules import V_SHAPED, stages_of_rank
from megatron_deepseek.parallel.schedule_rules import SCHEDULES

REPOSITORY = Path(__file__).parents[3]
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
    lines = list(explain(parse(COMMAND, 8), every=True))
    assert "8 ranks: dense mesh pp 2 x dp 2 x cp 2 x tp 1, expert mesh pp 2 x edp 2 x ep 2 x etp 1" == lines[0]
    assert [int(line.split()[0]) for line in lines[-8:]] == list(range(8))
    assert lines[-8].endswith("0, 3 of 4") and lines[-7].endswith("1, 2 of 4")


def test_equal_ranks_are_explained_together():
    """Of four ranks a stage, those two apart differ by their samples alone."""
    lines = list(explain(parse(COMMAND, 8)))
    assert [line.split() for line in lines[-2:]] == [["0,", "2", "whole", "0,", "3", "of", "4", "0-7"],
                                                     ["1,", "3", "whole", "1,", "2", "of", "4", "8-15"]]
    assert "0              0-3    0       35.3%  embedding, dense layer 0, layers 1-3, MTP 1" in lines
    assert "1              4-7    1       64.7%  head" in lines


def test_thousands_of_ranks_are_explained_in_a_page():
    """2,048 data ranks that all hold the same, and 16 stages of 64 places, of which no more than 16 are printed."""
    alike = list(explain(parse("--model tiny --data-path x --train-iters 1 --seq-length 256".split(), 2048)))
    assert alike[-1].split() == ["0-2047", "whole", "all", "0-15"]
    v3 = ("--model deepseek-v3 --data-path x --train-iters 1 --pipeline-model-parallel-size 16 "
          "--global-batch-size 4096 --pipeline-schedule DualPipeV --expert-model-parallel-size 64").split()
    lines = list(explain(parse(v3, 2048)))
    assert len(lines) < 50 and max(map(len, lines)) < 140
    assert lines[-2] == "... 48 lines more; --all lists every rank" and lines[-1].startswith("63, 127")


@pytest.mark.parametrize("numbers, text", [
    ([5], "5"), ([0, 1, 2, 3], "0-3"), ([0, 2], "0, 2"), ([0, 1, 8, 9], "0-1, 8-9"),
    (range(0, 1024, 64), "0, 64, ... 960 (16 ranks)")])
def test_ranks_in_short(numbers, text):
    assert in_short(numbers) == text


def test_a_stage_without_a_layer_of_experts_holds_none():
    layout = "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout E|t|ttt|mL --global-batch-size 4"
    settings = parse([*"--model tiny --data-path corpus --train-iters 1".split(), *layout.split()], 4)
    assert [line.split()[9] for line in list(explain(settings, every=True))[-4:]] == ["none", "none", "0-15", "0-15"]


def test_an_empty_stage_holds_nothing_and_has_no_work():
    layout = "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Ett||tt|mL --global-batch-size 4"
    settings = parse([*"--model tiny --data-path corpus --train-iters 1".split(), *layout.split()], 4)
    assert any(line.split(maxsplit=4) == ["1", "1", "1", "0.0%", "nothing, passes on"] for line in explain(settings))


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


def test_a_reader_that_has_enough_ends_it_quietly():
    """As `| head -1` does: no traceback, and no status of success."""
    command = [sys.executable, str(REPOSITORY / "pretrain_deepseek.py"), *COMMAND, "--global-batch-size", "2048",
               "--explain-layout", "2048", "--all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)}) as process:
        assert process.stdout.readline().startswith("2048 ranks")
        process.stdout.close()
        assert process.wait(timeout=120) == BROKEN_PIPE and process.stderr.read() == ""


def test_page_is_rendered_from_the_table():
    page = REPOSITORY / "docs" / "compatibility.md"
    assert page.read_text() == compatibility(), "run python -m megatron_deepseek.arguments.explain"
