"""Options of Megatron-LM that show a run or time its garbage: wandb, throughput, manual collection."""

import gc
import io
import sys
from types import SimpleNamespace

import pytest

from megatron_deepseek.runtime.garbage import GarbageCollection
from megatron_deepseek.runtime.metrics import StepMetrics
from megatron_deepseek.runtime.report import open_report
from megatron_deepseek.runtime.scalars import scalars
from megatron_deepseek.settings import RunSettings

STEP = StepMetrics(iteration=3, lm_loss=2.0, mtp_loss=(4.0, 5.0), balance_loss=None, grad_norm=1.0, learning_rate=0.5,
                   tokens=10, step_seconds=2.0, source_loss={"a": 1.5}, tflops_per_rank=12.5)


def test_names_of_scalars():
    values = {"iteration": 3, "loss": 2, "mtp_loss": (4.0, 5.0), "none": None, "source": {"a": 1.5}}
    assert dict(scalars("train", values)) == {"train/loss": 2.0, "train/mtp_loss_1": 4.0, "train/mtp_loss_2": 5.0,
                                              "train/source/a": 1.5}


class Wandb(SimpleNamespace):
    """A stand-in for the package, which takes notes."""

    def __init__(self):
        super().__init__(begun=[], logged=[], finished=0)

    def init(self, **what):
        self.begun.append(what)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_gets_every_number(tmp_path, monkeypatch):
    package = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    run = RunSettings(9, save=tmp_path, wandb_project="p", wandb_exp_name="n", wandb_entity="e")
    with open_report(run, stream=io.StringIO()) as report:
        report.step(STEP)
        report.validation(3, 1.5, (2.5,))
        report.held_out(3, "set", {"loss": 0.5})
    assert package.begun == [{"project": "p", "name": "n", "entity": "e", "dir": str(tmp_path / "wandb")}]
    assert (tmp_path / "wandb").is_dir() and package.finished == 1
    (step, train), validation, held_out = package.logged
    assert step == 3 and train["train/mtp_loss_2"] == 5.0 and train["train/tokens_per_second"] == 5.0
    assert train["train/source_loss/a"] == 1.5 and "train/balance_loss" not in train
    assert validation == (3, {"validation/lm_loss": 1.5, "validation/mtp_loss_1": 2.5})
    assert held_out == (3, {"held out/set/loss": 0.5})


def test_wandb_missing_or_unwilling_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb-project p needs the package wandb .*pip install 'wandb>="):
        open_report(RunSettings(9, wandb_project="p"), stream=io.StringIO())

    def refuse(**_):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(ValueError, match="--wandb-project p: no API key configured; WANDB_MODE=offline"):
        open_report(RunSettings(9, wandb_project="p"), stream=io.StringIO())


def test_throughput_is_shown_where_it_was_measured(tmp_path):
    stream = io.StringIO()
    with open_report(RunSettings(9, save=tmp_path), stream=stream) as report:
        report.step(STEP)
    assert "5 tokens/s | 12.5 TFLOP/s a rank |" in stream.getvalue()
    assert '"tflops_per_rank": 12.5' in (tmp_path / "metrics.jsonl").read_text()


def collections(run: RunSettings, steps: int) -> list[int]:
    """The generations that are collected on purpose or by chance while garbage is made for so many steps."""
    seen = []

    def note(phase, info):
        if phase == "start":
            seen.append(info["generation"])

    gc.freeze()  # what is there already takes a second to search
    gc.callbacks.append(note)
    try:
        with GarbageCollection(run) as garbage:
            for iteration in range(1, steps + 1):
                kept = [[] for _ in range(2000)]  # more than Python's threshold of 700
                garbage.after_step(iteration)
            garbage.around_evaluation()
            del kept
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
    return seen


def test_manual_collection_is_at_the_steps_of_the_interval_alone():
    manual = RunSettings(9, manual_gc=True, manual_gc_interval=4)
    assert collections(manual, 9) == [2, 2, 2, 0], "at the start, after 4 and 8, and at the evaluation"
    assert gc.isenabled()
    without_evaluations = RunSettings(9, manual_gc=True, manual_gc_eval=False)
    assert collections(without_evaluations, 9) == [2]


def test_python_collects_without_it():
    assert len(collections(RunSettings(9), 9)) > 4
