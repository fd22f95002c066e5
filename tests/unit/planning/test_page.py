"""docs/planning.md is what `plan.py table` prints today; what it says of models of grouped-query attention, by hand."""

from pathlib import Path

import pytest

from megatron_deepseek.cli.plan import main
from megatron_deepseek.cli.plan_options import settings_of
from megatron_deepseek.model.architecture.presets import load_config
from megatron_deepseek.planning.gpus import find_gpu
from megatron_deepseek.planning.sizing import fewest
from megatron_deepseek.planning.tasks import Task, cache_bytes_of_token

PAGE = Path(__file__).parents[3] / "docs" / "planning.md"


def test_the_page_is_made_anew(capsys):
    assert main(["table"]) == 0
    assert capsys.readouterr().out == PAGE.read_text()


@pytest.mark.parametrize("name, layers, kv_heads", [
    ("deepseek-r1-distill-qwen-32b", 64, 8), ("deepseek-r1-distill-llama-70b", 80, 8), ("deepseek-llm-7b", 30, 32)])
def test_cache_of_keys_and_values(name, layers, kv_heads):
    """In bf16: of each layer the keys and the values of all heads of 128."""
    assert cache_bytes_of_token(load_config(name)) == layers * 2 * kv_heads * 128 * 2


@pytest.mark.parametrize("name", ["deepseek-r1-distill-qwen-7b", "deepseek-r1-distill-llama-70b"])
def test_less_is_trained_on_fewer_gpus(name):
    settings = settings_of(f"--bf16 --model {name} --recompute-granularity full", 1)
    whole, lora, qlora = (fewest(settings, find_gpu("h100"), Task(task))[0] for task in ("finetune", "lora", "qlora"))
    assert whole > lora >= qlora
