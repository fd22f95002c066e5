"""The command line of tools/cache_logits.py: that of fine-tuning, with the teacher for a model, and a cache.

Mistakes in the command line are reported before torch is imported.
"""

import argparse
import os
from collections.abc import Sequence

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.arguments.distillation import add_logit_cache
from megatron_deepseek.arguments.explain import explain_layout
from megatron_deepseek.arguments.finetuning import build_finetuning_parser

PROGRAM = "cache_logits.py"


def build_parser() -> argparse.ArgumentParser:
    """Return fine-tuning's parser, so that the same options give the same rows in the same layouts."""
    parser = build_finetuning_parser()
    parser.prog = PROGRAM
    parser.usage = f"torchrun ... {PROGRAM} --model NAME --load DIR --dataset FILE --output DIR ..."
    parser.description = ("Keep on disk what a teacher predicts of the label tokens of a run's data. The options are "
                          "those of finetune_deepseek.py, with the teacher's --model and --load; those of learning "
                          "rate, length and checkpoints count for nothing. docs/distillation.md has more.")
    add_logit_cache(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the command on this rank."""
    explain_layout(argv, build_parser)
    settings = parse_or_exit(argv, os.environ, build_parser)
    if "--check-only" in argv:
        return
    if settings.fine_tuning.dry_run:
        from megatron_deepseek.finetuning.dry_run import show_data

        show_data(settings)
        return
    from megatron_deepseek.finetuning.distillation.caching import cache_logits

    cache_logits(settings)
