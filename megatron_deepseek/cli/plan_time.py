"""`plan.py time`: how long a step of a run takes, what that costs, and where the time goes."""

import argparse
import json
from collections.abc import Sequence

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.completion import completed
from megatron_deepseek.cli.plan_options import check_files, job_of, plan_parser, write
from megatron_deepseek.planning.calibration import calibrated
from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.stage_time import Scales
from megatron_deepseek.planning.step_time import step_time
from megatron_deepseek.planning.time_report import TimePlan, time_json, time_lines
from megatron_deepseek.planning.trace import trace

DESCRIPTION = "How long a step of a run takes, by simulating its schedule, and what that costs."


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add what a plan of time can be told of runs that were measured."""
    parser.add_argument("--calibrate", type=values.path, metavar="RUN",
                        help="take speeds from a --save directory, its metrics.jsonl, or a profile of a rank")


def plan_time(argv: Sequence[str]) -> int:
    """Run `plan.py time`."""
    parser = plan_parser("time", DESCRIPTION)
    add_calibration(parser)
    parser.add_argument("--price", type=values.positive, metavar="MONEY", help="of a GPU for an hour")
    parser.add_argument("--trace", type=values.path, metavar="FILE",
                        help="also write the step as a trace for Perfetto or chrome://tracing")
    args = parser.parse_args(completed(argv))
    check_files(args)
    job, gpu = job_of(args)
    scales, words = scales_of(args, job, gpu)
    plan = TimePlan(step_time(job, gpu, scales), words, args.price)
    print("\n".join(time_lines(plan)))
    if args.json is not None:
        write(args.json, json.dumps(time_json(plan)))
    if args.trace is not None:
        write(args.trace, json.dumps(trace(plan.step)))
    if args.picture is not None:
        from megatron_deepseek.planning.schedule_picture import draw_schedule

        draw_schedule(plan.step, args.picture)
    return 0


def scales_of(args: argparse.Namespace, job: Job, gpu: Gpu, planned: bool = True) -> tuple[Scales, str | None]:
    """Return the scales of --calibrate and a line on them, or those of a plan that was not calibrated. `planned`: a run
    that does not say what it was can be taken to be `job`.
    """
    return (Scales(), None) if args.calibrate is None else calibrated(job, gpu, args.calibrate, planned)
