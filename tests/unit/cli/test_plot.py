"""Curves read from metrics.jsonl and the command that draws them."""

import json
import math

import numpy as np
import pytest

from megatron_deepseek.cli.plot import draw, main, read_curves, smooth


@pytest.fixture
def metrics(tmp_path):
    """Ten steps, of which the fourth was not finite, with two MTP depths and a validation."""
    def record(i):
        loss = None if i == 4 else 9.0 - i / 4
        return {"iteration": i, "lm_loss": loss, "mtp_loss": [loss, 5.0], "learning_rate": i * 1e-4, "grad_norm": 1.0}

    records = [record(i) for i in range(1, 11)]
    records.insert(5, {"iteration": 5, "validation_lm_loss": 7.5, "validation_mtp_loss": [8.0, 8.5]})
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_curves_keep_steps_and_validations_apart(metrics):
    curves = read_curves(metrics, "run")
    assert curves.iteration.tolist() == list(range(1, 11))
    assert np.isnan(curves.lm_loss[3]) and curves.lm_loss[4] == 7.75
    assert curves.mtp_loss.shape == (10, 2)
    assert curves.validation_iteration.tolist() == [5] and curves.validation_mtp_loss.tolist() == [[8.0, 8.5]]


def test_each_of_several_sets_has_its_curve_and_name(metrics, monkeypatch):
    """And one alone is the validation, as before there were names."""
    held = [{"iteration": at, "eval_set": name, "eval_loss": at + loss, "eval_mtp_loss": [8.0]}
            for at in (0, 10) for name, loss in (("wiki", 1.0), ("code", 2.0))]
    for records, names in ((held, ["wiki", "code"]), (held[::2], [])):
        steps = [line for line in metrics.read_text().splitlines() if "lm_loss" in line and "validation" not in line]
        metrics.write_text("".join(line + "\n" for line in (*map(json.dumps, records[:1]), *steps, *map(
            json.dumps, records[1:]))))
        curves = read_curves(metrics, "run")
        assert [each.name for each in curves.sets] == names
        assert [(each.iteration.tolist(), each.loss.tolist()) for each in curves.sets] == [
            ([0, 10], [1.0, 11.0]), ([0, 10], [2.0, 12.0])][:len(names)]
        assert curves.validation_lm_loss.tolist() == [1.0, 11.0]
        drawn = []
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.extend(
            text.get_text() for text in figure.axes[0].get_legend().get_texts()))
        draw([curves], metrics.with_name("loss.png"))
        shown = [text for text in drawn if text.startswith("validation")]
        assert shown == ([*(f"validation {name}" for name in names), "validation wiki, MTP depth 1"] if names else
                         ["validation", "validation, MTP depth 1"])


def test_smooth_is_a_mean_about_each_point():
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    expected = [np.nanmean(values[max(i - 1, 0):i + 2]) for i in range(5)]
    assert smooth(values, 3) == pytest.approx(expected)
    assert smooth(values, 1) == pytest.approx(values, nan_ok=True)
    assert smooth(np.array([math.inf, math.nan]), 2) == pytest.approx([math.nan] * 2, nan_ok=True)


def test_draws_a_png_beside_the_metrics(metrics, capsys):
    assert main([str(metrics)]) == 0
    png = metrics.with_name("loss.png")
    assert capsys.readouterr().out == f"{png}\n"
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 20_000


def test_a_directory_stands_for_the_metrics_in_it(metrics, capsys):
    assert main([str(metrics.parent)]) == 0
    assert capsys.readouterr().out == f"{metrics.with_name('loss.png')}\n"
    assert main([str(metrics), "--output", str(metrics.parent)]) == 2
    assert f"--output {metrics.parent} is a directory; give a file in it" in capsys.readouterr().err


def test_compares_runs(metrics, tmp_path):
    output = tmp_path / "new" / "both.png"
    assert main([str(metrics), str(metrics), "--output", str(output), "--labels", "one rank", "two"]) == 0
    assert output.stat().st_size > 20_000


@pytest.mark.parametrize("content, options, words", [
    (None, [], "metrics.jsonl"),
    ("", [], "holds no training step"),
    ("what\n", [], "line 1"),
    ('{"iteration": 1, "lm_loss": 2.0}\n', ["--labels", "a", "b"], "names 2 runs, but there are 1 files"),
    ('{"iteration": 1, "lm_loss": "x"}\n', [], "metrics.jsonl holds a value that is no number"),
    ('{"iteration": 1, "lm_loss": 2.0, "mtp_loss": 7}\n', [], "metrics.jsonl holds a value that is no number"),
    ('{"iteration": 1, "lm_loss": 2.0}\n', ["--output", "/dev/null/x.png"], "/dev/null")])
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, content, options, words):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    assert main([str(path), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and words in printed.err and printed.err.count("\n") == 1
