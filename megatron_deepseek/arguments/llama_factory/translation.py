"""A recipe of LLaMA-Factory as the commands that train the same here, with remarks, in the form of a shell script."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.arguments.llama_factory import data, model, preference, training
from megatron_deepseek.arguments.llama_factory.keys import IGNORED, NO_EQUIVALENT
from megatron_deepseek.arguments.llama_factory.recipe import Recipe
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.near_names import near_names

FINETUNE, PRETRAIN = "finetune_deepseek.py", "pretrain_deepseek.py"
_WIDTH = 110
_TEXTS, _CONVERSATIONS = "pt", "sft"
_UNKNOWN = "it is no key of LLaMA-Factory or transformers that is known here"
_KNOWN = ("stage", "dataset", "template", "cutoff_len", "model_name_or_path", "output_dir", "learning_rate",
          "num_train_epochs", "lora_rank", "lora_alpha", "lora_target", "lora_dropout", "warmup_ratio", "packing",
          "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "finetuning_type")


@dataclass(frozen=True)
class Processes:
    """How many ranks are started: on a node, and the nodes. `known`: whether anything says so."""

    per_node: int = 1
    nodes: int = 1
    known: bool = True

    @property
    def words(self) -> str:
        """Return the command that starts them, without the entry."""
        more = f" --nnodes {self.nodes} --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port $MASTER_PORT"
        return f"torchrun --nproc_per_node {self.per_node}{more if self.nodes > 1 else ''}"


@dataclass(frozen=True)
class Translation:
    """The recipe after all keys, and the entry that takes its arguments."""

    recipe: Recipe
    entry: str
    processes: Processes

    def lines(self) -> Iterator[str]:
        """Yield the lines of a shell script: remarks, what is to be done first, and the command."""
        yield from _remarks("Not as with LLaMA-Factory:", self.recipe.differs)
        yield from _remarks("Left out, for nothing here stands for it:",
                            [f"{key}   ({reason})" for key, reason in self.recipe.left_out])
        yield from self.recipe.first
        yield " \\\n    ".join((f"{self.processes.words} {self.entry}", *_filled(self.recipe.words())))


def translate(given: Mapping[str, Any], processes: Processes) -> Translation:
    """Translate a recipe. Raise ValueError, naming the key, for one that cannot be trained here."""
    stage = given.get("stage") or _CONVERSATIONS
    if stage not in (_TEXTS, _CONVERSATIONS, *preference.STAGES):
        raise ValueError(f"stage {stage} is not translated: {_CONVERSATIONS}, {_TEXTS} and "
                         f"{', '.join(preference.STAGES)} are")
    parser = build_parser() if stage == _TEXTS else build_finetuning_parser()
    r = Recipe(given, parser.options, processes.per_node * processes.nodes)
    r.take("stage")
    if not processes.known:
        r.differs.append("one process: LLaMA-Factory starts one for each GPU that it sees; --nproc-per-node and "
                         "--nnodes say how many there are")
    for of_model in (model.weights, model.method, model.quantisation):
        of_model(r)
    if stage != _TEXTS:
        data.conversations(r)
    training.batches(r, training.ranks(r))
    if stage in preference.STAGES:
        preference.objective(r, stage)
        preference.rows_of(r, stage)
    epochs = training.length(r)
    if stage == _TEXTS:
        data.texts(r, r.integer("cutoff_len", 2048), epochs)
    for step in (training.rate, training.optimizer, model.numbers, model.losses, model.memory,
                 training.files, training.reports):
        step(r)
    _rest(r)
    return Translation(r, PRETRAIN if stage == _TEXTS else FINETUNE, processes)


def _rest(r: Recipe) -> None:
    """Name every key that is left, with the reason why nothing stands for it."""
    reasons = {name: (keys.reason, harmless) for keys in NO_EQUIVALENT for name, harmless in keys.each()}
    ignored = {name for name, _ in IGNORED.each()}
    for key, value in r.left.items():
        if key in ignored:
            continue
        reason, harmless = reasons.get(key, (_unknown(key, {*reasons, *ignored, *_KNOWN}), ()))
        if str(value).lower() not in harmless:
            r.leave(key, value, reason)


def _unknown(key: str, known: set[str]) -> str:
    near = near_names(key, sorted(known), 0.75)
    return _UNKNOWN + (f"; did you mean {near[0]}?" if near else "")


def _remarks(title: str, remarks: list[str]) -> Iterator[str]:
    if remarks:
        yield f"# {title}"
    for remark in remarks:
        yield from textwrap.wrap(remark, _WIDTH, initial_indent="# * ", subsequent_indent="#   ",
                                 break_long_words=False, break_on_hyphens=False)


def _filled(options: Iterable[str]) -> Iterator[str]:
    """Yield lines of options, each as many as have room."""
    line = ""
    for option in options:
        if line and len(line) + len(option) > _WIDTH:
            yield line
            line = ""
        line += f" {option}" if line else option
    yield line
