"""Options of Megatron-LM that show a run or time its garbage: curves, wandb, throughput, manual collection."""

import gc
import io
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_deepseek.runtime import megatron_curves
from megatron_deepseek.runtime.garbage import GarbageCollection
from megatron_deepseek.runtime.megatron_curves import Curves, StepCurves
from megatron_deepseek.runtime.metrics import StepMetrics
from megatron_deepseek.runtime.report import open_report
from megatron_deepseek.runtime.tensorboard import TensorBoard
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


def curves_of(run: RunSettings, *steps: StepMetrics, balance: str = "seq_aux_loss") -> list[Curves | None]:
    made = StepCurves(run, balance, 4, torch.device("cpu"))
    return [made.of(step, 16, 16 * step.iteration) for step in steps]


def test_curves_have_megatrons_names():
    """Those of training.py, training_log, and of the trackers of MoE and MTP in megatron-core."""
    always = {"learning-rate": 0.5, "batch-size": 16, "lm loss": 2.0, "grad-norm": 1.0}
    (plain,) = curves_of(RunSettings(9), STEP)
    assert plain == Curves(always, {"mtp_1 loss": 4.0, "mtp_2 loss": 5.0}, 48)
    step = replace(STEP, balance_loss=0.25, num_zeros=7, params_norm=3.5)
    run = RunSettings(9, log_world_size_to_tensorboard=True, log_memory_to_tensorboard=True)
    (more,) = curves_of(run, step)
    assert more.by_samples == {**always, "world-size": 4, "num-zeros": 7, "params-norm": 3.5}
    assert more.others == {"mtp_1 loss": 4.0, "mtp_2 loss": 5.0, "seq_load_balancing_loss": 0.25}
    assert curves_of(run, step, balance="aux_loss")[0].others["load_balancing_loss"] == 0.25


def test_memory_is_what_torch_counts(monkeypatch):
    counted = {"reserved_bytes.all.current": 4, "allocated_bytes.all.current": 2, "allocated_bytes.all.peak": 3,
               "allocation.all.current": 1, "num_ooms": 0}
    monkeypatch.setattr(megatron_curves, "memory_statistics", lambda device: counted)
    (curves,) = curves_of(RunSettings(9, log_memory_to_tensorboard=True), replace(STEP, mtp_loss=()))
    assert curves.others == {"mem-reserved-bytes": 4, "mem-allocated-bytes": 2, "mem-max-allocated-bytes": 3,
                             "mem-allocated-count": 1}


def test_timers_are_means_of_an_interval_and_the_rest_has_an_interval_of_its_own():
    steps = [replace(STEP, iteration=number, step_seconds=float(number), tflops_per_rank=10.0 / number, mtp_loss=())
             for number in range(1, 5)]
    run = RunSettings(9, log_interval=2, log_timers_to_tensorboard=True, log_throughput=True,
                      tensorboard_log_interval=4)
    first, second, third, fourth = curves_of(run, *steps)
    assert first is third is None
    assert second == Curves({}, {"iteration-time": 1.5, "throughput": pytest.approx(20 / 3)}, 32)
    assert fourth.others == {"iteration-time": 3.5, "throughput": pytest.approx(20 / 7)}
    assert "lm loss" in fourth.by_samples


def test_curves_are_over_iterations_and_over_samples(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    package = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    run = RunSettings(9, save=tmp_path, tensorboard_dir=tmp_path / "tb", wandb_project="p")
    with open_report(run, stream=io.StringIO()) as report:
        report.curves(3, Curves({"lm loss": 2.0}, {"iteration-time": 1.5}, 48))
        report.curves(3, Curves({"lm loss validation-0": 4.0}, {}))
        report.curves(4, None)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {(tag, point.step, point.value) for tag in events.Tags()["scalars"] for point in events.Scalars(tag)} == {
        ("lm loss", 3, 2.0), ("lm loss vs samples", 48, 2.0), ("iteration-time", 3, 1.5),
        ("lm loss validation-0", 3, 4.0), ("lm loss validation-0 vs samples", 48, 4.0)}
    assert package.logged == [(3, {"lm loss": 2.0, "iteration-time": 1.5, "samples vs steps": 48}),
                              (3, {"lm loss validation-0": 4.0})]
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_events_wait_in_the_queue(tmp_path):
    """Until there are as many as it takes, or two minutes have gone, or the end; without a queue none waits."""
    def written() -> int:
        (path,) = tmp_path.glob("*/events*")
        return path.stat().st_size

    board = TensorBoard(tmp_path / "one", 0, print)
    before = written()
    board.curves(1, Curves({}, {"a": 1.0}))
    assert written() > before
    board.close()
    (tmp_path / "one").rename(tmp_path.with_name("elsewhere"))
    board = TensorBoard(tmp_path / "queue", 0, print, queue_size=4)  # two events are of the file itself
    board.curves(1, Curves({}, {"a": 1.0}))
    assert written() == 0
    board.curves(1, Curves({}, {"a": 1.0, "b": 2.0}))
    full = written()
    assert full > 0
    board.close()
    assert written() > full


def test_norms_and_zeros_are_in_the_records(tmp_path):
    with open_report(RunSettings(9, save=tmp_path), stream=io.StringIO()) as report:
        report.step(replace(STEP, num_zeros=7, params_norm=3.5))
    assert '"num_zeros": 7, "params_norm": 3.5' in (tmp_path / "metrics.jsonl").read_text()


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
