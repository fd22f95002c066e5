"""--metrics-file: a text that OpenMetrics' own parser reads, where it is installed; and its rules, held here."""

import io
import re
from pathlib import Path

import pytest

from megatron_deepseek.runtime.metrics import StepMetrics
from megatron_deepseek.runtime.open_metrics import OpenMetricsFile
from megatron_deepseek.runtime.report import open_report
from megatron_deepseek.settings import RunSettings

SAMPLE = re.compile(r'(\w+)\{run="((?:[^"\\\n]|\\.)*)"(?:,(\w+)="([^"\\]*)")?\} (\S+)')


def step(iteration: int, **more) -> StepMetrics:
    fields = dict(lm_loss=2.5, mtp_loss=(3.0, 4.0), balance_loss=None, grad_norm=float("nan"), learning_rate=1e-3,
                  tokens=100, step_seconds=0.5, mfu=0.4, peak_memory_bytes=1 << 33)
    return StepMetrics(iteration=iteration, **(fields | more))


def read(path: Path) -> dict[str, list[tuple[dict, str]]]:
    """The samples by name; each is below its own TYPE, UNIT and HELP, in this order, and the text ends with EOF."""
    lines = path.read_text().split("\n")
    assert lines[-2:] == ["# EOF", ""]
    samples, metric, kind, said = {}, None, None, []
    for line in lines[:-2]:
        if line.startswith("# "):
            _, what, name, rest = line.split(" ", 3)
            said = [what] if what == "TYPE" else [*said, what]
            assert name == metric or what == "TYPE"
            metric, kind = name, rest if what == "TYPE" else kind
            assert what != "UNIT" or name.endswith("_" + rest)
            continue
        assert said in (["TYPE", "HELP"], ["TYPE", "UNIT", "HELP"])
        name, run, label, value, number = SAMPLE.fullmatch(line).groups()
        assert name == metric + ("_total" if kind == "counter" else "")
        own = {label: value} if label else {}
        samples.setdefault(name.removeprefix("megatron_deepseek_"), []).append((own, number))
    return samples


def test_numbers_with_units_and_labels(tmp_path):
    path = tmp_path / "m.prom"
    run = RunSettings(9, metrics_file=path, save=tmp_path / 'a "run"')
    with open_report(run, stream=io.StringIO()) as report:
        assert read(path)["tokens_total"] == [({}, "0")]
        report.step(step(7))
        report.step(step(8, lm_loss=2.25, skipped=True))
        report.validation(8, 3.5)
    found = read(path)
    assert found["iteration"] == [({}, "8")] and found["tokens_total"] == [({}, "200")]
    assert found["lm_loss_nats"] == [({}, "2.25")] and found["validation_lm_loss_nats"] == [({}, "3.5")]
    assert found["mtp_loss_nats"] == [({"depth": "1"}, "3.0"), ({"depth": "2"}, "4.0")]
    assert found["grad_norm"] == [({}, "NaN")] and found["skipped_steps_total"] == [({}, "1")]
    assert found["peak_memory_bytes"] == [({}, str(1 << 33))] and found["step_seconds"] == [({}, "0.5")]
    assert '{run="a \\"run\\""}' in path.read_text()


def test_their_own_parser_reads_it(tmp_path):
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    run = RunSettings(9, metrics_file=tmp_path / "m", wandb_exp_name="x\\y")
    with open_report(run, stream=io.StringIO()) as report:
        report.step(step(7))
    families = {family.name: family for family in parser.text_string_to_metric_families((tmp_path / "m").read_text())}
    memory = families["megatron_deepseek_peak_memory_bytes"]
    assert (memory.type, memory.unit, memory.samples[0].value) == ("gauge", "bytes", 1 << 33)
    assert memory.samples[0].labels == {"run": "x\\y"}
    assert families["megatron_deepseek_tokens"].type == "counter"


def test_it_is_replaced_at_once_and_at_most_once_a_second(tmp_path):
    now, path = [100.0], tmp_path / "m.prom"
    file = OpenMetricsFile(path, "r", print, clock=lambda: now[0])
    inode = path.stat().st_ino
    for iteration, later in ((1, 0.5), (2, 0.4), (3, 0.2)):
        now[0] += later
        file.step(step(iteration))
    assert read(path)["iteration"] == [({}, "3")] and path.stat().st_ino != inode
    file.step(step(4))
    assert read(path)["iteration"] == [({}, "3")]
    file.close()
    assert read(path)["iteration"] == [({}, "4")] and [each.name for each in tmp_path.iterdir()] == ["m.prom"]


def test_what_cannot_be_written_is_said_once(tmp_path):
    said = []
    file = OpenMetricsFile(tmp_path / "none" / "m.prom", "r", said.append, clock=iter(range(0, 100, 2)).__next__)
    for iteration in (1, 2):
        file.step(step(iteration))
    assert len(said) == 1 and "m.prom cannot be written: No such file" in said[0]
    (tmp_path / "none").mkdir()
    file.close()
    assert read(tmp_path / "none" / "m.prom")["iteration"] == [({}, "2")]
