"""What the options of LoRA are read as, where a file has a say."""

import json

import pytest

from megatron_deepseek.arguments import parse

COMMAND = "--model tiny --data-path corpus --train-iters 1 --seq-length 256 --load base --lora-rank 8"


def dropout_of(*more: str) -> float:
    return parse([*COMMAND.split(), *more], 1).lora.lora_dropout


def test_dropout_is_the_arguments_or_else_the_loaded_adapters(tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "lora_dropout": 0.05}))
    beside = "--load-adapter", str(tmp_path)
    assert dropout_of() == 0 and dropout_of(*beside) == 0.05
    assert dropout_of(*beside, "--lora-dropout", "0.1") == 0.1 and dropout_of(*beside, "--lora-dropout", "0") == 0
    config.write_text("{}")
    assert dropout_of(*beside) == 0
    config.unlink()  # whether it must be there is known later: a run that goes on has an adapter of its own
    assert dropout_of(*beside) == 0


@pytest.mark.parametrize("found, message", [('{"lora_dropout": 1}', "has lora_dropout 1, with which nothing is learnt"),
                                            ('{"lora_dropout": "much"}', "lora_dropout. is .much., not a number"),
                                            ("{", "malformed JSON")])
def test_a_loaded_dropout_that_cannot_be(tmp_path, found, message):
    (tmp_path / "adapter_config.json").write_text(found)
    with pytest.raises(ValueError, match=message):
        dropout_of("--load-adapter", str(tmp_path))


def test_a_dropout_that_is_no_probability():
    with pytest.raises(ValueError, match="--lora-dropout: 1 is not from 0 up to, but not including, 1"):
        dropout_of("--lora-dropout", "1")
