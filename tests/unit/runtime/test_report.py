"""What a run leaves behind and shows: metrics.jsonl, progress, TensorBoard."""

import errno
import io
import json
import os
import pty
import sys

import pytest

from megatron_deepseek.runtime.metrics import StepMetrics, cut_after, read_metrics
from megatron_deepseek.runtime.report import Report, open_report
from megatron_deepseek.settings import RunSettings

STEP_KEYS = {"iteration", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "tokens",
             "tokens_per_second", "step_seconds"}


def step(iteration, **changes):
    fields = dict(iteration=iteration, lm_loss=9.0 - iteration / 10, mtp_loss=(9.5,), balance_loss=0.01, grad_norm=1.5,
                  learning_rate=2.2e-4, tokens=4096, step_seconds=0.5)
    return StepMetrics(**{**fields, **changes})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(path):
    """Strict JSON: Python's reader alone would take NaN."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_a_step_is_on_disk_before_the_next(tmp_path):
    report = open_report(RunSettings(10, save=tmp_path), stream=io.StringIO())
    report.step(step(1))
    [record] = lines(tmp_path / "metrics.jsonl")
    assert set(record) == STEP_KEYS
    assert record["mtp_loss"] == [9.5] and record["tokens_per_second"] == 8192.0
    report.step(step(2, mfu=0.4, peak_memory_bytes=10**9))
    report.validation(2, 8.5, (8.75,), None, (0.25,))
    assert set(lines(tmp_path / "metrics.jsonl")[1]) == STEP_KEYS | {"mfu", "peak_memory_bytes"}
    assert lines(tmp_path / "metrics.jsonl")[2] == {
        "iteration": 2, "validation_lm_loss": 8.5, "validation_mtp_loss": [8.75], "validation_mtp_acceptance": [0.25]}


def test_resuming_leaves_the_file_of_an_uninterrupted_run(tmp_path):
    def run(save, first, last, resumed):
        with open_report(RunSettings(9, save=save), resumed, io.StringIO()) as report:
            for iteration in range(first, last + 1):
                report.step(step(iteration))
                if iteration % 2 == 0:
                    report.validation(iteration, 8.0 - iteration)

    run(tmp_path / "whole", 1, 9, 0)
    run(tmp_path / "killed", 1, 7, 0)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 8, "lm_lo')
    run(tmp_path / "killed", 5, 9, 4)
    assert lines(tmp_path / "killed" / "metrics.jsonl") == lines(tmp_path / "whole" / "metrics.jsonl")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["metrics.jsonl"]


def test_what_is_removed_is_said(tmp_path):
    with open_report(RunSettings(9, save=tmp_path), stream=io.StringIO()) as report:
        for iteration in range(1, 6):
            report.step(step(iteration))
    shown = io.StringIO()
    open_report(RunSettings(9, save=tmp_path), 3, shown).close()
    assert "metrics.jsonl: removed 2 records after iteration 3" in shown.getvalue()


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0, "validation_lm_loss": 9.0}\n{"iteration": 1, "lm_loss": 9.0}\n')
    assert cut_after(path, 0) == 2
    assert path.read_text() == ""


def test_a_last_record_without_its_newline_is_kept_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}')
    assert cut_after(path, 2) == 0
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'


def test_an_interrupted_cut_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 2}\n{"iteration": 1}\n')
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cut_after(path, 1)
    assert [record["iteration"] for record in read_metrics(path)] == [2, 1]


def test_a_cut_needs_no_room(tmp_path, monkeypatch):
    """On a full disk a restarted run must still be able to go on."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iter')
    monkeypatch.setattr("megatron_deepseek.runtime.metrics.replace_content", pytest.fail)
    assert cut_after(path, 2) == 0 and path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'
    assert cut_after(path, 1) == 1 and path.read_text() == '{"iteration": 1}\n'


def test_a_full_disk_loses_neither_records_nor_events(tmp_path, monkeypatch):
    """Told once for each file; afterwards both are as if nothing had been."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(descriptor, data):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    real, full, shown = os.write, False, io.StringIO()
    monkeypatch.setattr("megatron_deepseek.runtime.appending.os.write", write)
    with open_report(RunSettings(9, save=tmp_path, tensorboard_dir=tmp_path / "tb"), stream=shown) as report:
        for iteration in range(1, 10):
            full = 3 <= iteration < 7
            report.step(step(iteration))
    assert [record["iteration"] for record in lines(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in events.Scalars("train/lm_loss")] == list(range(1, 10))
    assert shown.getvalue().count("cannot be written: No space left on device") == 2
    assert shown.getvalue().count("is written again, and nothing is missing") == 2


def test_records_that_never_found_room_are_an_error_but_hide_no_other(tmp_path, monkeypatch):
    report = open_report(RunSettings(9, save=tmp_path), stream=io.StringIO())
    monkeypatch.setattr("megatron_deepseek.runtime.appending.os.write",
                        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    report.step(step(1))
    with pytest.raises(OSError, match="bytes are missing.*metrics.jsonl"):
        with report:
            pass
    other = open_report(RunSettings(9, save=tmp_path), stream=io.StringIO())
    with pytest.raises(KeyError), other:
        other.step(step(1))
        raise KeyError("the run's own")


def test_losses_of_every_validation_set_are_shown(tmp_path):
    shown = io.StringIO()
    with open_report(RunSettings(9), stream=shown) as report:
        report.validation(3, 2.5, (), {"web": 2.0, "code": 3.0})
        report.validation(6, 2.5, (2.75,), {str(number): 1.0 for number in range(20)})
    first, second = shown.getvalue().splitlines()
    assert first == "validation at iteration 3 | lm loss 2.5000 | web 2.0000, code 3.0000"
    assert second.startswith("validation at iteration 6 | lm loss 2.5000 | mtp loss 2.7500 | 0 1.0000, 1 1.0000, ")
    assert second.endswith("15 1.0000, and 4 more")


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with open_report(RunSettings(9, save=tmp_path), stream=io.StringIO()) as report:
        report.step(step(1, lm_loss=float("nan"), mtp_loss=(float("inf"), 1.0), grad_norm=float("inf")))
    [record] = lines(tmp_path / "metrics.jsonl")
    assert (record["lm_loss"], record["mtp_loss"], record["grad_norm"]) == (None, [None, 1.0], None)


def test_plain_lines_every_log_interval(tmp_path):
    shown = io.StringIO()
    with open_report(RunSettings(25, log_interval=10), 2, shown) as report:
        for iteration in range(3, 26):
            report.step(step(iteration))
        report.validation(25, 7.25, (7.5,), mtp_acceptance=(0.5, 0.125))
    *steps, validation = shown.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in steps] == [f"iteration {i:>2}/25" for i in (3, 10, 20, 25)]
    assert "lm loss 8.0000 | mtp loss 9.5000 | grad norm 1.500 | learning rate 2.200e-04 | 8,192 tokens/s" in steps[1]
    assert steps[-1].endswith("| 0:00:00 left")
    assert validation == "validation at iteration 25 | lm loss 7.2500 | mtp loss 7.5000 | mtp acceptance 50.0% 12.5%"
    assert "\r" not in shown.getvalue()


def test_time_left_goes_by_the_steps_of_this_process(monkeypatch):
    """Resumed at 2 of 12: 4 steps in 8 seconds, 6 more to go."""
    now, shown = [100.0], io.StringIO()
    monkeypatch.setattr("megatron_deepseek.runtime.report.time.monotonic", lambda: now[0])
    with open_report(RunSettings(12, log_interval=6), 2, shown) as report:
        for iteration in range(3, 7):
            now[0] += 2.0
            report.step(step(iteration))
    assert shown.getvalue().splitlines()[-1].endswith("| 0:00:12 left")


def test_a_bar_on_a_terminal():
    shown = Terminal()
    with open_report(RunSettings(4), 1, shown) as report:
        report.message("resumed from iteration 1")
        for iteration in (2, 3, 4):
            report.step(step(iteration))
    assert "resumed from iteration 1\n" in shown.getvalue()
    last = shown.getvalue().rstrip("\n").split("\r")[-1]
    assert "4/4" in last and "lm loss 8.6000, 8,192 tokens/s" in last
    assert shown.getvalue().endswith("\n")


def test_other_ranks_are_silent(capsys):
    with Report() as report:
        report.step(step(1))
        report.validation(1, 8.0)
        report.message("nobody reads this")
    assert capsys.readouterr() == ("", "")


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, resumed in ((1, 5, 0), (4, 6, 3)):
        with open_report(RunSettings(6, tensorboard_dir=tmp_path), resumed, io.StringIO()) as report:
            for iteration in range(first, last + 1):
                report.step(step(iteration, lm_loss=float(10 * resumed + iteration), balance_loss=None))
            report.validation(last, 7.0, (7.5, 8.5))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/lm_loss")] == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35),
                                                                         (6, 36)]
    assert set(events.Tags()["scalars"]) == {
        "train/lm_loss", "train/mtp_loss_1", "train/grad_norm", "train/learning_rate", "train/tokens",
        "train/step_seconds", "train/tokens_per_second", "validation/lm_loss", "validation/mtp_loss_1",
        "validation/mtp_loss_2"}


def test_tensorboard_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "tensorboard.compat.proto", raising=False)
    with pytest.raises(ValueError, match=f"--tensorboard-dir {tmp_path} needs the package tensorboard"):
        open_report(RunSettings(6, tensorboard_dir=tmp_path), stream=io.StringIO())


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"iteration": 1}\nhello\n')
    with pytest.raises(ValueError, match="m.jsonl, line 2 .*'hello'"):
        list(read_metrics(tmp_path / "m.jsonl"))


def test_training_goes_on_without_a_reader(tmp_path, capsys):
    """`torchrun ... | head`: what is printed is lost, said once, and the records are not."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream, open_report(RunSettings(3, save=tmp_path), stream=stream) as report:
        for iteration in (1, 2, 3):
            report.step(step(iteration))
    assert [record["iteration"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert capsys.readouterr().err == "nobody reads the output any more; training goes on\n"


def test_a_terminal_without_a_width_gets_lines():
    """As pty.openpty makes one; a bar of no columns would show nothing of the training."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    with os.fdopen(theirs, "w") as stream, open_report(RunSettings(10), stream=stream) as report:
        report.step(step(1))
        shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert shown.startswith("iteration  1/10 | lm loss 8.9000")
