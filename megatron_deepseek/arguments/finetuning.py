"""The command line of fine-tuning: pre-training's arguments, with conversations for data, epochs, and recipes.

A recipe is what a published fine-tuning says of its learning rate, AdamW, length and rows. It gives defaults: what is
on the command line wins.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.distillation import add_distillation
from megatron_deepseek.arguments.parser import (
    AFTER_DATA,
    BEFORE_LENGTH,
    BETWEEN_LENGTH_AND_DATA,
    TOKENIZER_TYPES,
    add_batch,
    add_lengths,
)
from megatron_deepseek.arguments.preference import add_preference
from megatron_deepseek.launch.command_line import OneLineParser

PROGRAM = "finetune_deepseek.py"
TEMPLATES = ("auto", "deepseek-v2", "deepseek-v3", "deepseek-r1", "deepseek-v3.1")
OVERLONG = ("drop", "truncate", "error")
HISTORY_REASONING = ("keep", "drop", "as-release")
SPLIT_TURNS = ("none", "reasoning")
LOSS_AVERAGES = ("token", "sample")
RECIPES: Mapping[str, Mapping[str, Any]] = {
    # V3 report (arXiv 2412.19437), section 5.1; its AdamW is that of pre-training, section 4.2.
    "deepseek-v3": dict(epochs=2, lr=5e-6, min_lr=1e-6, lr_decay_style="cosine", adam_beta2=0.95, weight_decay=0.1),
    # R1 (Nature 645, 2025), appendix B.4.2: 2 to 3 epochs.
    "deepseek-r1": dict(epochs=2, lr=5e-5, min_lr=5e-6, lr_decay_style="cosine", adam_beta2=0.95, weight_decay=0.1,
                        seq_length=32768, global_batch_size=128),
    # ScienceOne-AI/DeepSeek-671B-SFT-Guide, code/scripts/sft_deepseek.py; samples of a row to themselves.
    "scienceone": dict(epochs=1, lr=2e-7, min_lr=0.0, lr_decay_style="cosine", lr_warmup_fraction=0.03,
                       lr_warmup_init=2e-12, adam_beta2=0.999, weight_decay=0.0, seq_length=32768, packing=False,
                       train_think_prefix=True, history_reasoning="keep"),
}
# Pre-training's arguments for data, which the validation rules and settings ask for, have these values here.
_NO_PRETRAINING_DATA = dict(data_path=None, data_args_path=None, train_data_path=None, valid_data_path=None,
                            test_data_path=None, mock_data=False, per_split_data_args_path=None, split="1,0,0",
                            reset_attention_mask=True, reset_position_ids=False, eod_mask_loss=False)
DEFAULT_RECIPE = "deepseek-v3"
_OTHER_DEFAULTS = {"moe_router_bias_update_rate": "0, the bias stays as it is", "eval_iters": "all of a set, 0: none"}
_LENGTHS = ("train_iters", "train_samples", "epochs")
_FRACTIONS_OF_LR = ("min_lr", "lr_warmup_init")  # with another --lr these stay the same part of it


class RecipeHelp(argparse.MetavarTypeHelpFormatter):
    """Help in which options have fine-tuning's defaults, those of the recipes among them, not pre-training's."""

    def _get_help_string(self, action: argparse.Action) -> str:
        values = {name: _shown(recipe[action.dest]) for name, recipe in RECIPES.items() if action.dest in recipe}
        own = values.pop(DEFAULT_RECIPE, _OTHER_DEFAULTS.get(action.dest))
        if own is None and not values:
            return action.help
        text, usual = re.fullmatch(r"(.*?)\s*(?:\(([^()]*)\))?", action.help).groups()
        usual = own or usual or _shown(action.default)
        others = [f"{name}: {value}" for name, value in values.items() if value != usual]
        return f"{text} ({'; '.join([usual, *others])})".lstrip()


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


class FineTuningParser(OneLineParser):
    """A parser whose defaults are those of --recipe, the first on the command line or DEFAULT_RECIPE."""

    def parse_args(self, args=None, namespace=None):
        self.set_defaults(**dict.fromkeys(_FRACTIONS_OF_LR))
        given = super().parse_args(args, namespace)
        recipe = RECIPES[given.recipe]
        self.set_defaults(**{name: value for name, value in recipe.items() if name != "epochs"})
        arguments = super().parse_args(args, argparse.Namespace())
        if not any(getattr(given, name) for name in _LENGTHS):
            arguments.epochs = recipe["epochs"]
        for name in _FRACTIONS_OF_LR:
            if getattr(given, name) is None:
                setattr(arguments, name, recipe.get(name, 0.0) * (arguments.lr / recipe["lr"]))
        return arguments


def build_finetuning_parser() -> argparse.ArgumentParser:
    parser = FineTuningParser(prog=PROGRAM, formatter_class=RecipeHelp,
                              usage=f"torchrun ... {PROGRAM} --model NAME --load DIR --dataset FILE ...",
                              description="Fine-tune a DeepSeek model on conversations. Defaults are given in "
                              f"parentheses; where other recipes than {DEFAULT_RECIPE} have others, with their names.",
                              epilog="examples/ has scripts that start it for each model, on one node and on many.")
    for add in (*BEFORE_LENGTH, add_preference, add_distillation, _add_length_and_batch, *BETWEEN_LENGTH_AND_DATA,
                _add_data, *AFTER_DATA):
        add(parser)
    parser.set_defaults(**_NO_PRETRAINING_DATA)
    return parser


def _add_length_and_batch(parser):
    parser.add_argument_group("recipe", "learning rate, AdamW, length and rows as published; what is given beside it "
                              "wins").add_argument("--recipe", type=str, choices=tuple(RECIPES),
                                                   default=DEFAULT_RECIPE, help=f"({DEFAULT_RECIPE})")
    group = parser.add_argument_group("length and batch")
    length = group.add_mutually_exclusive_group()
    add_lengths(length)
    length.add_argument("--epochs", type=values.positive_int, help="passes over the data (the recipe's)")
    add_batch(group)


def _add_data(parser):
    add = parser.add_argument_group("conversations", "docs/finetuning.md has the formats").add_argument
    add("--dataset", type=str, nargs="+", metavar="FILE", required=True,
        help="files of conversations, or WEIGHT FILE ...")
    add("--eval-dataset", type=str, nargs="+", metavar="FILE", help="held-out files, each a set of its own")
    add("--template", type=str, choices=TEMPLATES, default="auto",
        help="how conversations are written (auto: what the tokenizer's tokens say)")
    add("--max-length", type=values.positive_int, metavar="TOKENS", help="of a conversation (--seq-length)")
    add("--overlong", type=str, choices=OVERLONG, default="drop", help="what becomes of longer ones (drop)")
    add("--packing", action=argparse.BooleanOptionalAction, default=True,
        help="several conversations in a row, which do not see each other (yes)")
    add("--loss-average", type=str, choices=LOSS_AVERAGES, default="token",
        help="every token of a batch counts alike, or every sample (token)")
    add("--train-think-prefix", action="store_true",
        help="loss on a forced <think> too, which the model is given and does not write")
    add("--history-reasoning", type=str, choices=HISTORY_REASONING, default="as-release",
        help="thoughts of turns before the last question (as-release: as the template has them)")
    add("--split-turns", type=str, choices=SPLIT_TURNS, default="none",
        help="reasoning: each answer with thoughts as a sample that ends with it and has loss on it alone (none)")
    add("--neftune-alpha", type=values.non_negative, default=0.0, metavar="ALPHA",
        help="noise on embeddings, uniform within +-ALPHA / sqrt(tokens of the sample x hidden size) (0: none)")
    add("--max-bad-rows", type=values.count, default=0, metavar="N", help="rows that may be skipped (0)")
    add("--num-workers", type=values.positive_int, default=2, help="processes that tokenise (2)")
    add("--data-cache-path", type=values.path_text, metavar="DIR", help="where token ids are kept (beside the data)")
    add("--tokenizer-type", type=str, choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0],
        help=f"({TOKENIZER_TYPES[0]})")
    add("--tokenizer-model", type=str, metavar="PATH",
        help="tokenizer.json or a directory with one (the one that is with --load)")
    add("--generate-every", type=values.positive_int, metavar="N",
        help="write answers to held-out prompts every N iterations, to SAVE/answers")
    add("--generate-prompts", type=values.positive_int, default=8, metavar="N", help="so many of --eval-dataset (8)")
    add("--generate-tokens", type=values.positive_int, default=128, metavar="N", help="of an answer at most (128)")
    add("--dry-run", action="store_true",
        help="show samples with what is trained on, counts and lengths, and leave; no model is built")


