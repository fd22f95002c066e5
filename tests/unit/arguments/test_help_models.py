"""--help-models: every preset with its size and names, whatever else is given."""

import re

import pytest

from megatron_deepseek.arguments.help_models import model_lines
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.cli.plan import main as plan
from megatron_deepseek.model.architecture.presets import PRESETS


def test_it_lists_every_preset_and_its_names():
    text = "\n".join(model_lines())
    for preset in PRESETS:
        assert re.search(rf"^{re.escape(preset.name)} ", text, re.M), preset.name
        assert all(re.search(rf"(^    |, ){re.escape(alias)}(,|$)", text, re.M) for alias in preset.aliases)
    assert all(len(line) <= 120 for line in model_lines())


def test_sizes_in_the_units_of_the_reports():
    """By hand: V3's 671B with 37B active, 11.6B of MTP's own (README_WEIGHTS.md: 11.5B); the tiny one's in test_config.
    """
    rows = {line.split()[0]: line.split()[1:] for line in model_lines() if line and not line.startswith(" ")}
    assert rows["deepseek-v3"] == ["671.0B", "36.6B", "11.6B", "163,840", "deepseek_v3"]
    assert rows["tiny"] == ["3.7M", "1.8M", "504.5K", "4,096", "deepseek_v3"]
    assert rows["deepseek-v2-lite"] == ["15.7B", "2.5B", "-", "163,840", "deepseek_v2"]


@pytest.mark.parametrize("arguments", [[], ["--model", "nothing", "--train-iters", "x"]])
def test_it_needs_nothing_else(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        build_parser().parse_args(["--help-models", *arguments])
    assert left.value.code == 0
    assert capsys.readouterr().out.splitlines() == list(model_lines())


@pytest.mark.parametrize("command", ["memory", "time", "search"])
def test_plans_have_it_too(command, capsys):
    assert plan([command, "--help-models"]) == 0
    assert capsys.readouterr().out.splitlines() == list(model_lines())
