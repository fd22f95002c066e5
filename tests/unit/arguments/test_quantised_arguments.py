"""The arguments of quantised base weights: what they mean, and what they do not go with."""

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.model.architecture.base_weights import BaseSettings

RUN = "--data-path x --train-iters 1 --load base --bf16"
LORA = f"{RUN} --lora-rank 4"
LITE = f"{LORA} --model deepseek-v2-lite --tensor-model-parallel-size"


@pytest.mark.parametrize("options, expected", [
    ("", None), ("--quantization-bit 4", BaseSettings(4, True)), ("--quantization-bit 8", BaseSettings(8)),
    ("--quantization-bit 4 --no-double-quantization", BaseSettings(4, False)),
    ("--quantization-bit 4 --double-quantization", BaseSettings(4, True))])
def test_what_they_mean(options, expected):
    assert parse(f"{LORA} --model tiny {options}".split(), 1).base == expected


@pytest.mark.parametrize("arguments, ranks, message", [
    (f"{RUN} --model tiny --quantization-bit 4", 1, "--quantization-bit 4 needs --lora-rank"),
    (f"{LORA} --model tiny --no-double-quantization", 1, "--no-double-quantization need --quantization-bit 4"),
    (f"{LORA} --model tiny --quantization-bit 4 --fp8-format e4m3", 1, "--quantization-bit 4 conflicts with --fp8"),
    (f"{LORA} --model tiny --quantization-bit 8 --fp8-format e4m3", 1,
     "a rank has 64 rows of model.layers.1.mlp.experts.gate_up_proj"),
    (f"{LITE} 2 --quantization-bit 4", 2,
     "mlp.down_proj.weight has 10944 columns, which 2 tensor-parallel ranks divide inside a block of 64"),
    (f"{LITE} 4 --quantization-bit 8", 4, "10944 columns, which 4 tensor-parallel ranks divide inside a block of 128")])
def test_what_they_do_not_go_with(arguments, ranks, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        parse(arguments.split(), ranks)


def test_v3_has_them_in_layouts_of_its_own():
    layout = "--tensor-model-parallel-size 8 --expert-model-parallel-size 8"
    for options in ("--quantization-bit 4", "--quantization-bit 8", "--quantization-bit 8 --fp8-format e4m3"):
        assert parse(f"{LORA} --model deepseek-v3 {layout} {options}".split(), 8).base is not None
