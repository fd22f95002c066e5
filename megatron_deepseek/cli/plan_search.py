"""`plan.py search`: the layout that trains fastest on so many GPUs, with the arguments that ask for it."""

import argparse
import json
import shlex
from collections.abc import Sequence

from megatron_deepseek.arguments.auto_layout import accept_for, defaults
from megatron_deepseek.arguments.settings import build_settings
from megatron_deepseek.arguments.completion import completed
from megatron_deepseek.cli.plan_options import check_files, job_of, plan_parser, write
from megatron_deepseek.cli.plan_time import add_calibration, scales_of
from megatron_deepseek.planning.candidates import words
from megatron_deepseek.planning.search import Search
from megatron_deepseek.planning.search_report import search_json, search_lines

DESCRIPTION = ("Search the layout that trains fastest: meshes, schedule, dispatcher, micro-batch, sharding, stages, "
               "recomputation and offloading together. Arguments of a layout that are given stay as they are.")


def plan_search(argv: Sequence[str]) -> int:
    """Run `plan.py search`."""
    parser = plan_parser("search", DESCRIPTION)
    add_calibration(parser)
    args = parser.parse_args(completed(argv))
    check_files(args)
    if args.global_batch_size is None:
        raise ValueError("plan.py search needs --global-batch-size: which layouts are good depends on how many "
                         "micro-batches a step has")
    given = _given(args, argv)
    plain = argparse.Namespace(**{**vars(args), **defaults(), "world_size": 1})
    job, gpu = job_of(plain)
    scales, calibration = scales_of(args, job, gpu, planned=False)
    limit = gpu.memory_bytes if args.memory_limit is None else args.memory_limit
    accept = accept_for(build_settings, plain, args.world_size, min(args.world_size, gpu.scale_up_gpus))
    found = Search(job, gpu, limit, args.world_size, accept, given, scales).run()
    said = [shlex.join(words(plan.values, defaults())) for plan in found.plans]
    print("\n".join(search_lines(found, job, gpu, limit, args.world_size, said, calibration)))
    if args.json is not None:
        write(args.json, json.dumps(search_json(found, said, calibration)))
    return 0 if found.plans else 1


_FOLLOW = ("sequence_parallel", "moe_ranks_per_node", "overlap_moe_expert_parallel_comm", "moe_shared_expert_overlap")
_STAGES = ("pipeline_model_parallel_layout", "num_layers_per_virtual_pipeline_stage",
           "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
           "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def _given(args: argparse.Namespace, argv: Sequence[str]) -> dict:
    """Return the values of the searched arguments that the user typed. Raise ValueError for stages: they are found."""
    typed = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")}
    stages = [name for name in _STAGES if name in typed]
    if stages:
        raise ValueError(f"--{stages[0].replace('_', '-')} says what search is to find; plan.py time prices it")
    return {name: getattr(args, name) for name in defaults() if name in typed and name not in _FOLLOW}
