#!/usr/bin/env python3
"""Fine-tune a DeepSeek model: torchrun --nproc_per_node N finetune_deepseek.py --model NAME --load DIR --dataset FILE

Mistakes in the command line are reported before torch is imported.
"""

from megatron_deepseek.launch.agent import end_with_agent

if __name__ == "__main__":
    end_with_agent()  # before anything that takes time

import os
import sys

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.arguments.explain import explain_layout
from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.dry_run.command import dry_run
from megatron_deepseek.launch.entry import run


def main() -> None:
    explain_layout(sys.argv[1:], build_finetuning_parser)
    dry_run(sys.argv[1:], build_finetuning_parser, "--dataset")
    settings = parse_or_exit(sys.argv[1:], os.environ, build_finetuning_parser)
    if "--check-only" in sys.argv[1:]:
        return
    if settings.fine_tuning.dry_run:
        from megatron_deepseek.finetuning.dry_run import show_data

        show_data(settings)
        return
    from megatron_deepseek.finetuning.loop import finetune

    finetune(settings)


if __name__ == "__main__":
    run("finetune_deepseek.py", main)
