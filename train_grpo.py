#!/usr/bin/env python3
"""Train a DeepSeek model by rewards: torchrun --nproc_per_node N train_grpo.py --model NAME --load DIR --prompts FILE

Mistakes in the command line are reported before torch is imported.
"""

from megatron_deepseek.launch.agent import end_with_agent

if __name__ == "__main__":
    end_with_agent()  # before anything that takes time

import os
import sys

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.arguments.explain import explain_layout
from megatron_deepseek.arguments.grpo import build_grpo_parser
from megatron_deepseek.launch.entry import run


def main() -> None:
    explain_layout(sys.argv[1:], build_grpo_parser)
    settings = parse_or_exit(sys.argv[1:], os.environ, build_grpo_parser)
    if "--check-only" in sys.argv[1:]:
        return
    from megatron_deepseek.rl.task import reinforce

    reinforce(settings)


if __name__ == "__main__":
    run("train_grpo.py", main)
