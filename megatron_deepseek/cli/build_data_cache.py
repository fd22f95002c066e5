"""The command line of tools/build_data_cache.py, which builds the indices of a training run ahead of time.

It takes the data arguments of pretrain_deepseek.py; see docs/blends.md.
"""

import argparse
import sys
import time

from tqdm import tqdm

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.data_paths import data_arguments, data_paths
from megatron_deepseek.arguments.parser import add_data
from megatron_deepseek.data.cache import remove_unfinished
from megatron_deepseek.data.data_plan import DataPlan
from megatron_deepseek.data.pretraining import check_data, make_plan
from megatron_deepseek.data.table import describe_split
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.settings import DataSettings

PROGRAM = "build_data_cache.py"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Build the indices by which pretrain_deepseek.py reads its "
                           "samples, on all cores of this machine. A run with the same data arguments, "
                           "--seq-length and --seed finds them, and builds nothing; a shorter run does, too.")
    add_data(parser)
    group = parser.add_argument_group("the run")
    add = group.add_argument
    add("--seq-length", type=values.positive_int, default=4096, help="tokens of a training sequence (4096)")
    add("--seed", type=values.count, default=1234, help="of the order of samples (1234)")
    length = group.add_mutually_exclusive_group(required=True)
    length.add_argument("--train-samples", type=values.positive_int, help="sequences to train on")
    length.add_argument("--train-iters", type=values.positive_int, help="iterations of --global-batch-size")
    add("--global-batch-size", type=values.positive_int, help="sequences in an update, for counts of iterations")
    add("--eval-iters", type=values.count, default=0, help="batches of an evaluation (0: none)")
    add("--vocab-size", type=values.positive_int, help="also look for ids outside it")
    add("--workers", type=values.positive_int, help="processes (one on each core)")
    args = parser.parse_args(argv)
    if args.global_batch_size is None and (args.train_iters or args.eval_iters):
        raise ValueError("--train-iters and --eval-iters need --global-batch-size")
    return args


def settings_of(args: argparse.Namespace) -> DataSettings:
    data_path, split_data_paths = data_paths(args)
    names = ("seq_length", "split", "data_cache_path", "tokenizer_type", "tokenizer_model", "eod_mask_loss",
             "reset_attention_mask", "seed")
    return DataSettings(data_path, split_data_paths=split_data_paths, data_arguments=data_arguments(args),
                        **{name: getattr(args, name) for name in names})


def build(plan: DataPlan, workers: int | None) -> int:
    """Build the missing indices with a progress bar and return the number of those of samples."""
    remove_unfinished(plan.folder)
    missing = plan.missing(say=lambda line: print(line, file=sys.stderr))
    total = sum(source.end - source.first for source in missing.samples)
    with tqdm(total=total, unit="seq", unit_scale=True, desc=f"{len(missing.samples)} indices", disable=None) as bar:
        plan.build(missing, workers, lambda source: bar.update(source.end - source.first))
    return len(missing.samples)


def run(argv: list[str]) -> int:
    args, begin = parse_arguments(argv), time.perf_counter()
    settings = settings_of(args)
    samples = args.train_samples or args.train_iters * args.global_batch_size
    num_samples = (samples, args.eval_iters * (args.global_batch_size or 0), 0)
    check_data(settings, args.vocab_size, num_samples)
    plan = make_plan(settings, num_samples)
    built = build(plan, args.workers)
    for name, split in zip(("train", "valid"), plan.splits):
        if split is not None:
            print("\n".join(describe_split(name, split, most_rows=sys.maxsize)))
    print(f"{built} indices built in {plan.folder}, {time.perf_counter() - begin:.1f} s")
    return 0


def main(argv: list[str]) -> int:
    return exit_status(PROGRAM, lambda: run(argv), "interrupted; indices that were finished stay")

