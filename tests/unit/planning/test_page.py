"""docs/planning.md is what `plan.py table` prints today; the distilled models have the sizes that they are known by."""

from pathlib import Path

import pytest

from megatron_deepseek.cli.plan import main
from megatron_deepseek.planning.distilled import MODELS, fewest
from megatron_deepseek.planning.gpus import find_gpu

PAGE = Path(__file__).parents[3] / "docs" / "planning.md"


def test_the_page_is_made_anew(capsys):
    assert main(["table"]) == 0
    assert capsys.readouterr().out == PAGE.read_text()


@pytest.mark.parametrize("name, billions", [
    ("Qwen-1.5B", 1.78), ("Qwen-7B", 7.62), ("Llama-8B", 8.03), ("Qwen-14B", 14.77), ("Qwen-32B", 32.76),
    ("Llama-70B", 70.55)])
def test_distilled_models_have_their_sizes(name, billions):
    """As their pages on the Hub say them, without tied embeddings."""
    (model,) = (each for each in MODELS if each.name.endswith(name))
    assert model.parameters / 1e9 == pytest.approx(billions, abs=0.005)


def test_less_is_trained_on_fewer_gpus():
    for model in MODELS:
        whole, lora, qlora = (fewest(model, task, find_gpu("h100"), 4096, 0) for task in ("finetune", "lora", "qlora"))
        assert whole >= lora >= qlora
