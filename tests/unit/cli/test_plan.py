"""tools/plan.py: what it prints and writes, and what it says to a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deepseek.cli.plan import main

ROOT = Path(__file__).parents[3]
V3 = ("memory --model deepseek-v3 --bf16 --pipeline-model-parallel-size 16 --pipeline-schedule DualPipeV "
      "--expert-model-parallel-size 64 --global-batch-size 15360 --recompute-granularity selective").split()


def test_v3_on_2048_ranks(tmp_path, capsys):
    """No data, no tokenizer, no length: the table of equal ranks, the worst with its moment, three terms, imbalance."""
    report, picture = tmp_path / "v3.json", tmp_path / "v3.png"
    assert main([*V3, "--world-size", "2048", "--gpu", "H800", "--json", str(report), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    for words in ("2048 x h800 of 79.1 GiB, pretrain, engine ours: pp 16 x dp 128", "2-14 ", "15  ",
                  "layers 4-5 | layers 58-59", "worst: rank 256 (pipeline rank 2)", "kept: activations of MoE layers",
                  "x 1.25:", "x 2:", "verdict: oom", "to fit:", "--recompute-granularity full"):
        assert words in out, words
    plan = json.loads(report.read_text())
    assert plan["verdict"] == "oom" and plan["worst_rank"] == 256 and len(plan["ranks"]) == 2048
    assert [rank["rank"] for rank in plan["ranks"]] == [*range(2048)]
    for rank in plan["ranks"][::100]:
        parts = ("weights_bytes", "gathered_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes",
                 "receive_bytes", "other_bytes")
        assert sum(rank[part] for part in parts) == pytest.approx(rank["peak_bytes"], abs=len(parts))
        assert rank["peak_bytes"] < rank["low_bytes"] < rank["high_bytes"]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("engine", ["ours", "megatron", "zero3"])
@pytest.mark.parametrize("task", ["pretrain", "finetune", "lora", "qlora", "grpo", "serve"])
def test_every_task_of_every_engine(engine, task, tmp_path, capsys):
    report = tmp_path / "plan.json"
    assert main(f"memory --model deepseek-v2-lite --bf16 --world-size 8 --gpu h100 --expert-model-parallel-size 8 "
                f"--recompute-granularity full --engine {engine} --task {task} --json {report}".split()) == 0
    assert f", {task}, engine {engine}: " in capsys.readouterr().out
    assert json.loads(report.read_text())["ranks"][7]["peak_bytes"] > 0


@pytest.mark.parametrize("arguments, message", [
    ("--world-size 8", "--gpu"),
    ("--gpu h100", "--world-size"),
    ("--world-size 8 --gpu h900", "--gpu 'h900' is not known; did you mean h"),
    ("--world-size 8 --gpu h100 --gpu-file nowhere.json", "nowhere.json"),
    ("--world-size 8 --gpu h100 --engine nemo", "--engine: invalid choice: 'nemo'"),
    ("--world-size 6 --gpu h100 --expert-model-parallel-size 4", "--expert-model-parallel-size 4"),
    ("--world-size 8 --gpu h100 --memory-limit lots", "--memory-limit: 'lots' is not a size"),
    ("--world-size 8 --gpu h100 --users 0", "--users: 0 is not at least 1"),
    ("--world-size 8 --gpu h100 --json /nowhere/plan.json", "/nowhere/plan.json"),
    ("--world-size 8 --gpu h100 --picture /nowhere/plan.png", "/nowhere/plan.png")])
def test_mistakes_are_told_in_a_line_before_the_work(arguments, message, capsys):
    assert main(["memory", "--model", "tiny", *arguments.split()]) == 2
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    assert not said.out and line.startswith("plan.py: error: ") and message in line


def test_changes_of_the_pipeline_are_tried_too(capsys):
    """Full recomputation does not shorten what waits for weight gradients, nor receive buffers."""
    assert main(f"{' '.join(V3[:-2])} --recompute-granularity full --world-size 2048 --gpu h800".split()) == 0
    out = capsys.readouterr().out.partition("to fit:")[2]
    assert "--recompute-granularity full --pipeline-schedule 1F1B: " in out


def test_the_papers_schedule(capsys, tmp_path):
    """Every rank has two stages of two copies of the model: 17 forwards wait everywhere, and nothing meets in a V."""
    report = tmp_path / "plan.json"
    arguments = [*V3[:4], *V3[4:6], *V3[8:], "--world-size", "2048", "--gpu", "h200", "--plan-schedule", "DualPipe"]
    assert main([*arguments, "--json", str(report)]) == 0
    assert ", DualPipe, 120 micro-batches" in capsys.readouterr().out
    ranks = json.loads(report.read_text())["ranks"]
    assert ranks[5 * 128]["peak_bytes"] == ranks[10 * 128]["peak_bytes"]  # pipeline ranks r and p - 1 - r hold the same


@pytest.mark.parametrize("arguments, message", [
    ("--pipeline-model-parallel-size 1", "needs an even number of pipeline ranks; --pipeline-model-parallel-size is 1"),
    ("--pipeline-model-parallel-size 2 --global-batch-size 12", "at least 4 for 2 pipeline ranks"),
    ("--pipeline-model-parallel-size 2 --global-batch-size 32 --pipeline-model-parallel-layout Et|t|t|tmL",
     "--pipeline-model-parallel-layout has 4")])
def test_where_the_papers_schedule_does_not_run(arguments, message, capsys):
    assert main(f"memory --model tiny --world-size 8 --gpu h200 --plan-schedule DualPipe {arguments}".split()) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_command_names_those_that_there_are(capsys):
    assert main(["memori"]) == 2
    assert "memory" in capsys.readouterr().err


def test_torch_is_never_imported():
    """Nor are data read: none exists."""
    program = ("import sys; from megatron_deepseek.cli.plan import main; "
               f"assert main({[*V3, '--world-size', '2048', '--gpu', 'h800']}) == 0; sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_of_planning_import_no_torch():
    names = [f"megatron_deepseek.planning.{path.stem}" for path in (ROOT / "megatron_deepseek/planning").glob("*.py")]
    program = f"""import importlib, sys
for name in {names}:
    importlib.import_module(name)
sys.exit("torch" in sys.modules)"""
    assert len(names) > 15 and subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
