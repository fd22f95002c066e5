"""LoRA as a user runs it: adapters trained, resumed in another layout, exchanged as PEFT's files, merged."""

import json

import pytest
from test_finetune import Bench, assert_same, steps
from torch_versions import keeps_bytes

from megatron_deepseek.cli.merge_lora import main as merge_lora

pytestmark = pytest.mark.slow

LORA = "--lora-rank", "2", "--lora-target", "all", "router", "mtp", "--lora-dropout", "0.1"


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("lora"))
    made.train(1, "start", "--train-iters", "1", "--lr", "0", "--save-hf", str(made.directory / "released"))
    return made


@pytest.fixture(scope="module")
def alone(bench) -> list[dict]:
    return bench.train(1, "alone", "--load", str(bench.directory / "released"), *LORA, "--train-iters", "4",
                       "--save-adapter", str(bench.directory / "adapter"))


def test_resumes_in_another_layout_and_keeps_adapters_alone(bench, alone):
    """Two steps on one rank, two on two expert ranks, with the same features dropped."""
    more = "--load", str(bench.directory / "released"), *LORA, "--train-iters", "4"
    bench.train(1, "moved", *more, "--exit-interval", "2")
    assert_same(bench.train(2, "moved", *more, "--expert-model-parallel-size", "2"), alone)
    checkpoint = bench.directory / "moved" / "iter_0000004"
    assert json.loads((checkpoint / "base.json").read_text())["directory"] == str(bench.directory / "released")
    assert (checkpoint / "adapter" / "adapter_config.json").is_file()
    refused = bench.run(1, "moved", "--load", str(bench.directory / "released"), "--train-iters", "5")
    assert refused.status == 2 and "holds adapters of rank 2 alone" in refused.output


@keeps_bytes
def test_qlora_says_its_memory_and_goes_on_in_another_layout(bench):
    """Beside NF4: two steps on one rank, two on two expert ranks, as four on one."""
    qlora = "--load", str(bench.directory / "released"), *LORA, "--train-iters", "4", "--quantization-bit", "4"
    whole = bench.run(1, "qlora", *qlora)
    assert whole.status == 0 and "base weights, nf4, scales quantised" in whole.output, whole.output
    assert whole.output.index(" MiB") < whole.output.index("loaded the weights")
    bench.train(1, "qlora_moved", *qlora, "--exit-interval", "2")
    moved = bench.train(2, "qlora_moved", *qlora, "--expert-model-parallel-size", "2")
    assert_same(moved, bench.metrics("qlora"))
    refused = bench.run(1, "qlora_moved", *qlora[:-1], "8")
    assert refused.status == 2 and "are nf4, scales quantised, in this run they are fp8" in refused.output


def test_an_adapter_that_is_loaded_and_one_that_is_merged_are_the_same_model(bench, alone):
    """The loss of a first step that learns nothing, from PEFT's files beside the base, and from the merged model."""
    directory = bench.directory
    assert merge_lora(["--base", str(directory / "released"), "--adapter", str(directory / "alone"), "--save",
                       str(directory / "merged")]) == 0
    once = "--train-iters", "1", "--lr", "0"
    beside = bench.train(1, "beside", "--load", str(directory / "released"), *LORA, "--load-adapter",
                         str(directory / "adapter"), "--lora-dropout", "0", *once)
    merged = bench.train(1, "from_merged", "--load", str(directory / "merged"), *once)
    (ours,), (theirs,) = steps(beside), steps(merged)
    assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-5)
    assert ours["mtp_loss"] == pytest.approx(theirs["mtp_loss"], rel=1e-5)
    assert abs(ours["lm_loss"] / steps(alone)[0]["lm_loss"] - 1) > 1e-4  # it has learnt something
