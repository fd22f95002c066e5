"""train_grpo.py in a process that is gone, by SIGKILL, in place of the COUNT-th call of something.

    dying_grpo.py WHAT:COUNT ARGUMENTS...
"""

import os
import signal
import sys

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.arguments.grpo import build_grpo_parser
from megatron_deepseek.inference.engine import Engine
from megatron_deepseek.rl import maker, reference
from megatron_deepseek.rl.records import Records
from megatron_deepseek.rl.task import reinforce
from megatron_deepseek.rewards.workers import RewardWorkers
from megatron_deepseek.training.trainer import Trainer

WHAT = {"token": (Engine, "step_to_ends"), "reward": (RewardWorkers, "score"), "step": (Trainer, "train_step"),
        "score": (Trainer, "score"), "record": (Records, "write"), "save": (maker, "write_rollout"),
        "reference": (reference.Reference, "_keep")}


def main() -> None:
    what, count = sys.argv[1].split(":")
    owner, name = WHAT[what]
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, call)
    reinforce(parse_or_exit(sys.argv[2:], os.environ, build_grpo_parser))


if __name__ == "__main__":
    main()
