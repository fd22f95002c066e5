"""`make pretrain` repeats a step exactly when what it would make could differ from what is there."""

import importlib.util
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "run_tiny.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("run_tiny", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["run_tiny"]


@pytest.fixture
def copy_step(tool, tmp_path):
    """A step that copies `in` to `out` and counts its runs; its code is `code`."""
    for name in ("in", "code"):
        (tmp_path / name).write_text(name)
    command = ("bash", "-c", f"cp {tmp_path}/in {tmp_path}/out; echo >> {tmp_path}/runs")
    return tool.Step("copy", command, (tmp_path / "code",), (tmp_path / "in",), (tmp_path / "out",))


ENVIRON = {"PATH": os.environ["PATH"], "STEPS": "10", "NPROC": "4"}


def runs(tool, step, tmp_path) -> int:
    tool.run_step(step, "[1/1]", tmp_path, ENVIRON)
    return len((tmp_path / "runs").read_text().splitlines())


def test_unchanged_is_reused(tool, copy_step, tmp_path, capsys):
    assert [runs(tool, copy_step, tmp_path) for _ in range(3)] == [1, 1, 1]
    assert capsys.readouterr().out.count("copy: still valid, reused") == 2


@pytest.mark.parametrize("name", ["in", "code", "out"])
def test_any_change_repeats(tool, copy_step, tmp_path, name):
    assert runs(tool, copy_step, tmp_path) == 1
    (tmp_path / name).write_text("changed")
    assert [runs(tool, copy_step, tmp_path) for _ in range(2)] == [2, 2]
    assert (tmp_path / "out").read_text() == (tmp_path / "in").read_text()


def test_a_failed_step_is_not_valid(tool, copy_step, tmp_path):
    assert runs(tool, copy_step, tmp_path) == 1
    (tmp_path / "in").unlink()
    with pytest.raises(SystemExit):
        tool.run_step(tool.Step("copy", ("false",), copy_step.code, copy_step.inputs, copy_step.outputs), "",
                      tmp_path, ENVIRON)
    (tmp_path / "in").write_text("in")
    assert runs(tool, copy_step, tmp_path) == 2


def training(tool, tmp_path, command="true"):
    return tool.Step("training", ("bash", "-c", command), (), (tmp_path / "in",), (tmp_path / "checkpoints/metrics",),
                     tmp_path / "checkpoints", tool.RUN)


def test_interrupted_training_goes_on_unless_its_inputs_changed(tool, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    (tmp_path / "in").write_text("1")
    for _ in range(2):
        with pytest.raises(SystemExit):
            tool.run_step(training(tool, tmp_path, f"mkdir -p {checkpoints}; echo >> {checkpoints}/half; false"), "",
                          tmp_path, ENVIRON)
    assert (checkpoints / "half").read_text() == "\n\n"
    changed = training(tool, tmp_path, f"mkdir {checkpoints} && touch {checkpoints}/metrics")
    tool.run_step(changed, "", tmp_path, ENVIRON)
    assert [path.name for path in checkpoints.iterdir()] == ["metrics"]


def test_checkpoints_of_others_are_not_removed(tool, tmp_path):
    (tmp_path / "in").write_text("1")
    (tmp_path / "checkpoints").mkdir()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="another origin"):
            tool.run_step(training(tool, tmp_path), "", tmp_path, ENVIRON, overwrite)
    assert (tmp_path / "checkpoints").exists()


def test_what_another_run_has_saved_is_removed_only_on_request(tool, tmp_path):
    """`make pretrain STEPS=20` after 120 steps: both runs and the ways out in a line, and nothing is lost."""
    checkpoints = tmp_path / "checkpoints"
    (tmp_path / "in").write_text("1")
    save = f"mkdir -p {checkpoints}; echo $STEPS > {checkpoints}/latest_checkpointed_iteration.txt; touch " \
        f"{checkpoints}/metrics"
    step = training(tool, tmp_path, save)
    tool.run_step(step, "", tmp_path, ENVIRON | {"STEPS": "120"})
    with pytest.raises(ValueError) as refused:
        tool.run_step(step, "", tmp_path, ENVIRON)
    assert str(refused.value) == (
        f"{checkpoints} holds a run of STEPS=120 NPROC=4, saved at iteration 120; this one has STEPS=10 NPROC=4: "
        "--overwrite (OVERWRITE=1) removes it, --run-dir (RUN_DIR=) goes elsewhere")
    (tmp_path / "in").write_text("2")
    with pytest.raises(ValueError, match="STEPS=120 .*; this one comes from other code or data: "):
        tool.run_step(step, "", tmp_path, ENVIRON | {"STEPS": "120"})
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "120\n"
    tool.run_step(step, "", tmp_path, ENVIRON, overwrite=True)
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "10\n"


def test_number_of_steps_and_processes_belongs_to_training_alone(tool, copy_step, tmp_path):
    step = training(tool, tmp_path)
    for other in ({"STEPS": "20"}, {"NPROC": "2"}):
        assert tool.fingerprint(step, ENVIRON) != tool.fingerprint(step, ENVIRON | other)
        assert tool.fingerprint(copy_step, ENVIRON) == tool.fingerprint(copy_step, ENVIRON | other)


def test_exported_variables_do_not_reach_the_example(tool, tmp_path, monkeypatch):
    for name in ("DATA_PATH", "TOKENIZER", "DRY_RUN", "NNODES"):
        monkeypatch.setenv(name, "9")
    environ = tool.environment(tmp_path, Namespace(steps=5, nproc=1))
    assert [environ[name] for name in ("DATA_PATH", "TOKENIZER", "DRY_RUN", "NNODES")] == ["", "", "", "1"]


def test_the_example_runs_in_the_python_that_runs_this(tool, tmp_path, monkeypatch):
    """`make PYTHON=python3.11 pretrain` exports the interpreter that made the environment, which has no torch."""
    monkeypatch.setenv("PYTHON", "/usr/bin/python3")
    environ = tool.environment(tmp_path, Namespace(steps=1, nproc=1))
    assert environ["PYTHON"] == sys.executable


def test_ctrl_c_waits_for_what_the_command_saves(tool, tmp_path):
    """It ends when the command does, even if that takes a while, and as interrupted."""
    saved = tmp_path / "saved"
    command = (f"import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(0.6); "
               f"open({str(saved)!r}, 'w').close()")
    step = tool.Step("training", (sys.executable, "-c", command), (), (), ())
    with pytest.raises(KeyboardInterrupt):
        tool.execute(step, dict(os.environ))
    assert saved.exists()


SEPARATED = "an\u2028answer"  # U+2028 ends a line of a text, and none of a file


def write_lines(path: Path, *records: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def test_completions_are_shown_whatever_they_have(tool, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    run_tiny_grpo = importlib.import_module("run_tiny_grpo")
    write_lines(tmp_path / "grpo_1" / "metrics.jsonl", {"eval_reward_exact": 0.5, "reward": 0.5})
    write_lines(tmp_path / "grpo_1" / "rollouts" / "step_1.jsonl",
                {"prompt": "p", "completion": SEPARATED, "reward": 1.0, "advantage": 0.0})
    assert f"a completion   {SEPARATED!r}" in run_tiny_grpo.results(tmp_path, [1])


def test_answers_are_shown_whatever_they_have(tool, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    run_tiny_finetuning = importlib.import_module("run_tiny_finetuning")
    save = run_tiny_finetuning.save_directory(tmp_path, False)
    write_lines(save / "metrics.jsonl", dict.fromkeys(("eval_loss", "eval_token_accuracy", "eval_exact_match"), 0.5))
    write_lines(save / "answers" / "step_1.jsonl", {"prompt": "p", "text": SEPARATED, "expected": "e", "matches": True})
    assert f"after          {SEPARATED!r}" in run_tiny_finetuning.results(tmp_path, False)
