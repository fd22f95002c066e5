"""tools/plan.py time and search: what they print and write, calibration, and what they say to a mistake."""

import gzip
import json
import shlex

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.cli.plan import main
from megatron_deepseek.planning.calibration import ARGUMENTS, METRICS

JOB = "--model tiny --seq-length 512 --pipeline-model-parallel-size 2 --global-batch-size 32 --world-size 4 --gpu h100"
SEARCH = "--model tiny --seq-length 512 --global-batch-size 32 --world-size 4 --gpu h100"


def run_of(arguments, tmp_path, capsys, command="time", job=JOB):
    """Return the JSON and what was printed."""
    path = tmp_path / "plan.json"
    assert main([command, *job.split(), "--json", str(path), *arguments.split()]) == 0
    return json.loads(path.read_text()), capsys.readouterr().out


def test_time_prints_and_writes_all_that_it_can(tmp_path, capsys):
    trace, picture = tmp_path / "trace.json", tmp_path / "schedule.png"
    found, out = run_of(f"--price 2 --trace {trace} --picture {picture}", tmp_path, capsys)
    assert found["tokens_per_second_per_gpu"] == pytest.approx(32 * 512 / found["step_seconds"] / 4)
    assert found["gpu_hours_per_trillion_tokens"] == pytest.approx(1e12 / found["tokens_per_second_per_gpu"] / 3600)
    assert found["price_per_trillion_tokens"] == pytest.approx(2 * found["gpu_hours_per_trillion_tokens"])
    assert found["calibrated"] is False and "not calibrated" in out and " at 2 a GPU hour" in out
    assert json.loads(trace.read_text())["traceEvents"]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def metrics_of(seconds, tokens=32 * 512, steps=10):
    return "".join(json.dumps({"iteration": at, "lm_loss": 1.0, "tokens": tokens, "step_seconds": seconds}) + "\n"
                   for at in range(1, steps + 1))


def test_calibration_by_metrics_gives_the_runs_own_step(tmp_path, capsys):
    plain, _ = run_of("", tmp_path, capsys)
    (tmp_path / METRICS).write_text(metrics_of(3 * plain["step_seconds"]))
    found, out = run_of(f"--calibrate {tmp_path}", tmp_path, capsys)
    assert found["calibrated"] and found["pipeline_seconds"] == pytest.approx(3 * plain["pipeline_seconds"])
    assert "computing x 3, travelling x 3" in out and "not calibrated" not in out


def recorded(folder, **model):
    """Write what a checkpoint of a run on one GPU records."""
    settings = parse("--model tiny --data-path a --train-iters 9 --seq-length 512 --global-batch-size 32".split(), 1)
    from dataclasses import asdict

    parts = {name: value for name, value in json.loads(json.dumps(asdict(settings), default=str)).items()
             if isinstance(value, dict)}
    parts["model"] |= model
    (folder / "iter_0000009").mkdir()
    (folder / "iter_0000009" / ARGUMENTS).write_text(json.dumps({"settings": parts}))


def test_calibration_by_a_run_in_another_layout(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    alone, _ = run_of("", tmp_path, capsys, job=JOB.replace("size 4", "size 1").replace(
        "--pipeline-model-parallel-size 2", ""))
    recorded(run)
    (run / METRICS).write_text(metrics_of(2 * alone["step_seconds"]))
    _, out = run_of(f"--calibrate {run}", tmp_path, capsys)
    assert "(1 ranks): computing x 2," in out


def test_calibration_by_a_profile_tells_computing_from_travelling(tmp_path, capsys):
    events = [{"ph": "X", "name": f"ProfilerStep#{at}", "ts": 0, "dur": 5e5} for at in (10, 11)]
    events += [{"ph": "X", "cat": "kernel", "name": "gemm", "ts": 0, "dur": 4e5},
               {"ph": "X", "cat": "kernel", "name": "ncclDevKernel_SendRecv", "ts": 0, "dur": 1e5}]
    path = tmp_path / "rank_00000_steps_10-12.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found, out = run_of(f"--calibrate {path}", tmp_path, capsys)
    scaled = out.split("computing x ")[1].split(", travelling")[0]
    assert float(scaled) > 1 and found["calibrated"]


@pytest.mark.parametrize("make, message", [
    (lambda folder: None, "has neither metrics.jsonl nor profile/rank_*.json.gz"),
    (lambda folder: (folder / METRICS).write_text(""), "has no steps with step_seconds"),
    (lambda folder: (folder / METRICS).write_text("{\n"), "line 1"),
    (lambda folder: (folder / METRICS).write_text(metrics_of(1.0, tokens=5)), "its steps have 5 tokens"),
    (lambda folder: ((folder / METRICS).write_text(metrics_of(1.0)), recorded(folder, hidden_size=8)),
     "is of another model: hidden_size is 8 there")])
def test_a_calibration_that_says_nothing_is_refused(make, message, tmp_path, capsys):
    make(tmp_path)
    assert main(["time", *JOB.split(), "--calibrate", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("command, arguments, message", [
    ("time", JOB + " --price 0", "--price"),
    ("time", JOB + " --calibrate /nowhere", "--calibrate /nowhere does not exist"),
    ("time", JOB + " --trace /nowhere/trace.json", "/nowhere/trace.json"),
    ("time", JOB.replace("h100", "h999"), "--gpu 'h999' is not known"),
    ("search", SEARCH.replace("h100", "h999"), "--gpu 'h999' is not known"),
    ("search", SEARCH.replace("--global-batch-size 32", ""), "needs --global-batch-size"),
    ("search", SEARCH + " --pipeline-model-parallel-layout Et|tttmL", "says what search is to find")])
def test_mistakes_are_told_in_a_line(command, arguments, message, capsys):
    assert main([command, *arguments.split()]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_search_prints_ten_and_the_arguments_of_the_first(tmp_path, capsys):
    found, out = run_of("", tmp_path, capsys, "search", SEARCH)
    assert len(found["plans"]) == 10 and found["calibration"] == "not calibrated"
    line = out.split("the first one's arguments:\n")[1].splitlines()[0].strip()
    assert line == found["plans"][0]["arguments"]
    settings = parse(["--model", "tiny", "--seq-length", "512", "--global-batch-size", "32", "--train-iters", "9",
                      "--data-path", "a", *shlex.split(line)], 4)
    assert settings.layout.world_size == 4


def test_search_of_what_fits_nowhere_tells_what_would_have_to_change(capsys):
    job = "--model deepseek-v2-lite --bf16 --seq-length 512 --global-batch-size 32 --world-size 1 --gpu h100"
    assert main(["search", *job.split(), "--memory-limit", "20GB"]) == 1
    out = capsys.readouterr().out
    assert "nothing fits on 1 x h100 with 18.6 GiB: the closest needs" in out and "--optimizer-cpu-offload" in out
