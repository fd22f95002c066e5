"""Experts' load: what is counted, kept, drawn and handed to loggers."""

import io
import json

import pytest
import torch
from PIL import Image

from megatron_deepseek.cli.plot import main as plot
from megatron_deepseek.runtime.expert_listener import ExpertLoadKeeper
from megatron_deepseek.runtime.expert_counter import ExpertCounter, is_shown
from megatron_deepseek.runtime.expert_load import ExpertLoad, read_history
from megatron_deepseek.runtime.report import open_report
from megatron_deepseek.settings import RunSettings


def load(iteration: int, steps: int = 1) -> ExpertLoad:
    return ExpertLoad(iteration, steps, {1: [3, 1, 0, 0], 2: [iteration, iteration, iteration, iteration]})


def test_violation_is_the_busiest_above_the_mean():
    """Of 3, 1, 0, 0 the mean is 1: the busiest has 2 more."""
    assert load(5).violation == {1: 2.0, 2: 0.0}
    assert load(5).max_violation == 2.0


def test_counts_are_summed_between_reports(meshes):
    """Layers that routed nothing, as MTP modules that an objective leaves out, are not shown."""
    counter = ExpertCounter(meshes, 3)
    step = {"model.layers.1.mlp": torch.tensor([1, 2, 3]), "model.layers.12.mlp": torch.tensor([0, 0, 0])}
    assert [counter.after_step(iteration, step) for iteration in (1, 2)] == [None, None]
    found = counter.after_step(3, step)
    assert (found.iteration, found.steps, found.counts) == (3, 3, {1: [3, 6, 9]})
    assert step["model.layers.1.mlp"].tolist() == [1, 2, 3]
    counter.after_step(4, step), counter.after_step(5, step)
    assert counter.after_step(6, step).counts == {1: [3, 6, 9]}


def test_a_run_that_keeps_nothing_counts_nothing(tmp_path):
    assert not is_shown(RunSettings(9))
    assert all(is_shown(RunSettings(9, **{name: tmp_path})) for name in ("save", "tensorboard_dir", "metrics_file"))


class Gallery:
    def __init__(self):
        self.pictures = []

    def picture(self, iteration, tag, png):
        self.pictures.append((iteration, tag, Image.open(io.BytesIO(png)).size))


def keeper(save, resumed=0):
    gallery = Gallery()
    return ExpertLoadKeeper(save, resumed, [gallery], print), gallery


def test_pictures_come_at_20_then_at_twice_the_length_and_at_the_end(tmp_path):
    first, gallery = keeper(tmp_path)
    for iteration in range(1, 51):
        first.expert_load(load(iteration))
    assert [picture[:2] for picture in gallery.pictures] == [(20, "experts/load"), (40, "experts/load")]
    first.close()
    assert gallery.pictures[-1][0] == 50 and Image.open(tmp_path / "expert_load.png").size == gallery.pictures[-1][2]
    records = [json.loads(line) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records if "tokens" in record] == [20, 40, 50]
    assert records[0] == {"iteration": 1, "steps": 1, "violation": {"1": 2.0, "2": 0.0}}


def test_a_resumed_run_goes_on_with_its_curve(tmp_path, monkeypatch):
    """What came after the checkpoint is removed, and made again."""
    first, _ = keeper(tmp_path)
    for iteration in range(1, 31):
        first.expert_load(load(iteration))
    first.close()
    drawn = []
    monkeypatch.setattr("megatron_deepseek.runtime.expert_listener.draw_load",
                        lambda runs: drawn.append(runs[""]) or b"")
    second = ExpertLoadKeeper(tmp_path, 25, [], print)
    for iteration in range(26, 29):
        second.expert_load(load(iteration))
    second.close()
    history = read_history(tmp_path / "expert_load.jsonl")
    assert [iteration for iteration, _ in history.violations] == list(range(1, 29))
    assert history.last.counts == load(28).counts
    assert [iteration for iteration, _ in drawn[-1].violations] == list(range(1, 29))


def test_a_damaged_file_or_a_full_disk_ends_no_training(tmp_path, capsys, monkeypatch):
    (tmp_path / "expert_load.jsonl").write_text('{"iteration": 1, "violation": [3]}\n')
    first, gallery = keeper(tmp_path, resumed=5)
    assert "is no record of experts' load" in capsys.readouterr().out
    monkeypatch.setattr("megatron_deepseek.runtime.expert_listener.replace_content", _no_room)
    for iteration in range(20, 50):
        first.expert_load(load(iteration))
    first.close()
    assert capsys.readouterr().out.count("expert_load.png is not drawn: no room") == 1 and not gallery.pictures


def test_a_file_that_cannot_be_made_is_made_later(tmp_path, capsys):
    (tmp_path / "save").write_text("a file where the directory should be")
    first, _ = keeper(tmp_path / "save")
    first.expert_load(load(1)), first.expert_load(load(2))
    assert capsys.readouterr().out.count("expert_load.jsonl cannot be made: ") == 1
    (tmp_path / "save").unlink()
    first.expert_load(load(3))
    first.close()
    assert (tmp_path / "save" / "expert_load.jsonl").read_text().startswith('{"iteration": 3')


def _no_room(*_) -> None:
    raise OSError("no room")


def test_short_runs_and_dense_models_leave_nothing(tmp_path):
    dense, _ = keeper(tmp_path)
    dense.close()
    assert not list(tmp_path.iterdir())
    short, gallery = keeper(tmp_path)
    short.expert_load(load(3))
    short.close()
    assert [path.name for path in tmp_path.iterdir()] == ["expert_load.jsonl"] and not gallery.pictures


def test_tensorboard_gets_the_picture_and_the_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunSettings(30, tensorboard_dir=tmp_path)
    with open_report(run, stream=io.StringIO()) as report:
        for iteration in (10, 20, 25):
            report.expert_load(load(iteration))
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("experts/max_violation")] == [2.0] * 3
    shown = events.Images("experts/load")
    assert [event.step for event in shown] == [20, 25]  # the last one as the report is closed
    assert Image.open(io.BytesIO(shown[0].encoded_image_string)).size == (shown[0].width, shown[0].height)


def test_runs_are_drawn_over_each_other(tmp_path, capsys):
    """The map of each run is as many pixels as it has experts; a run without a file is named."""
    for name in ("a", "b"):
        kept, _ = keeper(tmp_path / name)
        for iteration in (19, 20):
            kept.expert_load(load(iteration))
        kept.close()
    one = tmp_path / "one.png"
    assert plot(["--of", "experts", str(tmp_path / "a"), "--output", str(one)]) == 0
    assert plot(["--of", "experts", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert Image.open(tmp_path / "a" / "experts.png").size[1] > Image.open(one).size[1] + 100
    capsys.readouterr()
    assert plot(["--of", "experts", str(tmp_path / "a"), str(tmp_path)]) == 2
    assert "expert_load.jsonl is missing" in capsys.readouterr().err
    assert plot(["--of", "experts", *[str(tmp_path / "a")] * 2]) == 2
    assert "two runs have one name" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "expert_load.jsonl"
    path.write_text('{"iteration": 1, "lm_loss": 3}\n')
    with pytest.raises(ValueError, match="is no record of experts' load"):
        read_history(path)
