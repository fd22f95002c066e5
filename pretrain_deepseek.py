#!/usr/bin/env python3
"""Pre-train a DeepSeek model: torchrun --nproc_per_node N pretrain_deepseek.py --model NAME --data-path PREFIX ...

Mistakes in the command line are reported before torch is imported.
"""

from megatron_deepseek.launch.agent import end_with_agent

if __name__ == "__main__":
    end_with_agent()  # before anything that takes time

import os
import sys

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.arguments.explain import explain_layout
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.dry_run.command import dry_run
from megatron_deepseek.launch.entry import run


def main() -> None:
    explain_layout(sys.argv[1:])
    dry_run(sys.argv[1:], build_parser)
    settings = parse_or_exit(sys.argv[1:], os.environ)
    if "--check-only" in sys.argv[1:]:
        return
    from megatron_deepseek.pretraining.loop import pretrain

    pretrain(settings)


if __name__ == "__main__":
    run("pretrain_deepseek.py", main)
