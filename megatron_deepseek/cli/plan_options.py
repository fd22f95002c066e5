"""What the commands of tools/plan.py have in common: their options, and the job that these describe."""

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.base_weights import base_settings
from megatron_deepseek.arguments.completion import completed
from megatron_deepseek.arguments.lora import lora_settings
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.arguments.settings import build_settings
from megatron_deepseek.data.preprocess.files import refuse_unwritable
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.model.architecture.adapters import ALL
from megatron_deepseek.planning.actions import DUAL_PIPE
from megatron_deepseek.planning.engines import ENGINES
from megatron_deepseek.planning.gpus import Gpu, find_gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.tasks import NAMES, Task
from megatron_deepseek.settings import Settings

PROGRAM = "plan.py"
_OF_TASK = ("lora_rank", "lora_alpha", "lora_target", "lora_rs", "lora_plus_ratio", "quantization_bit",
            "double_quantization")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add to pre-training's parser what every plan of a run is told beside its arguments."""
    parser.conflict_handler = "resolve"  # --world-size is an option of dry runs too
    add = parser.add_argument_group("the plan").add_argument
    add("--world-size", type=values.positive_int, required=True, metavar="GPUS", help="ranks of the job")
    add("--gpu", type=str, required=True, metavar="NAME", help="a name in megatron_deepseek/planning/gpus.json")
    add("--gpu-file", type=values.path, metavar="FILE", help="further GPUs, in that file's form")
    add("--engine", type=str, choices=tuple(ENGINES), default="ours",
        help="whose bytes: this project's, Megatron-LM's distributed optimizer's, or ZeRO-3's (ours)")
    add("--plan-schedule", type=str, choices=(DUAL_PIPE,),
        help="a schedule that only plans have: the paper's, with two copies of the model (--pipeline-schedule)")
    add("--memory-limit", type=values.size, metavar="SIZE", help="of a GPU's memory, as 70GB or 60GiB (all of it)")
    add("--task", type=str, choices=NAMES, default="pretrain", help="what the job is for (pretrain)")
    add("--users", type=values.positive_int, default=Task.users,
        help="conversations in the cache: of all ranks (serve), or of each rollout engine (grpo) (1)")
    add("--context", type=values.positive_int, metavar="TOKENS", help="of each conversation (--seq-length)")
    add("--rollout-ranks", type=values.positive_int, default=Task.rollout_ranks,
        help="ranks that share a rollout engine's weights (1)")
    add("--serve-weight-bytes", type=values.positive, default=Task.weight_bytes, help="of a weight that serves: 1 for "
        "FP8 (2)")
    add("--json", type=values.path, metavar="FILE", help="also write the plan there")
    add("--picture", type=values.path, metavar="PNG", help="also draw it: the ranks' memory, or the schedule")


def plan_parser(command: str, description: str) -> OneLineParser:
    """Return pre-training's parser under another name, with the plan's options."""
    parser = build_parser()
    parser.prog, parser.usage = f"{PROGRAM} {command}", f"{PROGRAM} {command} --world-size GPUS --gpu NAME ARGUMENTS"
    parser.description, parser.epilog = description, None
    add_job_arguments(parser)
    return parser


def job_of(args: argparse.Namespace) -> tuple[Job, Gpu]:
    """Return the job that parsed arguments ask for, and the GPU."""
    gpu = find_gpu(args.gpu, args.gpu_file)
    settings = build_settings(without_lora(args), args.world_size, min(args.world_size, gpu.scale_up_gpus))
    job = Job(settings, ENGINES[args.engine], args.plan_schedule)
    if args.plan_schedule == DUAL_PIPE:
        refuse_dual_pipe(job)
    return job, gpu


def without_lora(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments without those of adapters: of a plan they belong to the task, and no base is loaded."""
    return argparse.Namespace(**vars(args) | dict.fromkeys(_OF_TASK))


def refuse_dual_pipe(job: Job) -> None:
    """Raise ValueError where DualPipe cannot run: micro-batches enter at both ends, and stages meet in the middle."""
    pp, count = job.layout.pp, job.micro_batches
    if pp % 2 or pp < 2:
        raise ValueError(f"--plan-schedule DualPipe needs an even number of pipeline ranks; "
                         f"--pipeline-model-parallel-size is {pp}")
    if count % 2 or count < 2 * pp:
        raise ValueError(f"--plan-schedule DualPipe needs an even number of micro-batches, at least {2 * pp} for {pp} "
                         f"pipeline ranks; --global-batch-size gives {count}")
    if len(job.stages) != pp:
        raise ValueError(f"--plan-schedule DualPipe cuts the model in as many stages as there are pipeline ranks, "
                         f"{pp}; --pipeline-model-parallel-layout has {len(job.stages)}")


def task_of(args: argparse.Namespace) -> Task:
    """Return what the job is for."""
    lora = lora_settings(args) or replace(Task.lora, lora_target=tuple(args.lora_target or (ALL,)))
    return Task(args.task, lora, base_settings(args), args.users, args.context or args.seq_length, args.rollout_ranks,
                args.serve_weight_bytes)


def check_files(args: argparse.Namespace) -> None:
    """Raise ValueError for files that the user asked for where none can be written."""
    for name in ("json", "picture", "trace"):
        path = getattr(args, name, None)
        if path is not None:
            refuse_unwritable(f"--{name}", path)


def write(path: Path, text: str) -> None:
    """Write a file that the user asked for. Raise ValueError where that cannot be."""
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def settings_of(arguments: str, world_size: int) -> Settings:
    """Return the settings of a run whose arguments are `arguments`."""
    return build_settings(build_parser().parse_args(completed(arguments.split())), world_size)
