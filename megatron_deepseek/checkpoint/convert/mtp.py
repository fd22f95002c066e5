"""Multi-Token Prediction modules that a config.json announces and the files lack: one rule for every format.

transformers, and most of those who convert V3 to BF16, write `num_nextn_predict_layers: 1` and not one tensor of such a
module. What the files hold counts: the model is read without modules, and the config.json that is written announces
none. If a part of a module is there, the rest was lost, which is an error.

A run whose model has more modules than its checkpoint must say which it wants: fewer, or new ones (--init-mtp). One
that takes over the weights alone may say --mtp-num-layers 0: it does without the modules that are there.
"""

from dataclasses import replace
from pathlib import Path

from megatron_deepseek.model.architecture.config import ModelConfig

LEFT_OUT = "part of an MTP module"
INCOMPLETE = "only a part of an MTP module is there: tools/convert_checkpoint.py --no-mtp makes a copy without"


def as_stored(config: ModelConfig, any_stored: bool, without_mtp: bool) -> tuple[ModelConfig, int]:
    """Return the architecture to read, and how many modules `config` announces while nothing of any is stored.

    `any_stored` says whether the files hold a tensor of any module. `without_mtp` asks to read none in any case.
    """
    announced = config.num_nextn_predict_layers
    if announced and (without_mtp or not any_stored):
        return replace(config, num_nextn_predict_layers=0), 0 if any_stored else announced
    return config, 0


def module_prefixes(config: ModelConfig, stored: int = 0) -> list[str]:
    """Return the beginnings of the tensors' Hugging Face names, one for each module after the first `stored`."""
    first = config.num_hidden_layers
    return [f"model.layers.{first + depth}." for depth in range(stored, config.num_nextn_predict_layers)]


def left_behind(directory: Path, modules: int) -> str:
    """Say that a run which takes over weights does without the modules that are with them."""
    named = "the Multi-Token Prediction module" if modules == 1 else f"all {modules} Multi-Token Prediction modules"
    return f"--mtp-num-layers 0: {named} of {directory} stay{'s' * (modules == 1)} behind; what this run saves has none"


def difference(there: int, here: int) -> str:
    """Say what to do about a checkpoint with `there` modules for a model with `here`, another number."""
    holds = f"it holds {there or 'no'} Multi-Token Prediction module{'s' * (there > 1)}, the model has {here}"
    if there < here:
        return f"{holds}: --mtp-num-layers {there} goes on with what there is, --init-mtp adds {here - there} new"
    return (f"{holds}: --mtp-num-layers {there} keeps what there is, --mtp-num-layers 0 does without where a run takes "
            f"over the weights alone (--finetune), tools/convert_checkpoint.py --no-mtp makes a copy without")
