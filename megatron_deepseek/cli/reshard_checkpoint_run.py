"""What the commands of tools/reshard_checkpoint.py do with their arguments; each returns the exit status.

It is apart from reshard_checkpoint.py, which parses them, because that file must not import torch.
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_deepseek.checkpoint import inspection
from megatron_deepseek.checkpoint.building import DirectoryBuild, Share
from megatron_deepseek.checkpoint.convert.conversion import DTYPES
from megatron_deepseek.checkpoint.native import WEIGHTS, find_checkpoint, open_checkpoint
from megatron_deepseek.checkpoint.reshard.comparison import Difference, compare
from megatron_deepseek.checkpoint.reshard.reshard import (
    average_build,
    files_of_ranks,
    files_of_size,
    reshard_build,
    tensors_to_write,
)
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.cli.checkpoint_options import build_with_progress, progress

if TYPE_CHECKING:
    from megatron_deepseek.checkpoint.reshard.rank_shards import Reads

_AVERAGE_FILE_BYTES = 1 << 30


def inspect(args: argparse.Namespace, share: Share) -> int:
    found = inspection.describe(open_checkpoint(args.directory, args.ckpt_step))
    print(json.dumps(found, indent=2) if args.json else "\n".join(inspection.lines(found)))
    return 0


def verify(args: argparse.Namespace, share: Share) -> int:
    directory = find_checkpoint(args.directory, args.ckpt_step)
    with progress(inspection.bytes_to_verify(directory)) as bar:
        damage = inspection.verify(directory, args.workers, bar.update)
    for line in damage:
        print(line)
    if damage:
        raise ValueError(f"{directory} is damaged: {len(damage)} file{'s' * (len(damage) > 1)}")
    print(f"{directory}: every file is as it was written")
    return 0


def reshard(args: argparse.Namespace, share: Share) -> int:
    # They import the model, which takes seconds; the other commands do without.
    from megatron_deepseek.checkpoint.reshard.rank_shards import find_holders, reads_of_ranks
    from megatron_deepseek.cli.target_layout import resolve_target_layout

    checkpoint = open_checkpoint(args.load, args.ckpt_step)
    given = {name: value for name, value in vars(args).items() if name in args.layout_arguments}
    target = resolve_target_layout(args, given, checkpoint)
    tensors = tensors_to_write(checkpoint, DTYPES.get(args.dtype), not args.drop_optimizer)
    holders = find_holders(target.division)
    files = files_of_ranks(holders, tensors, checkpoint)
    if args.dry_run:
        _print_reads(reads_of_ranks(holders, tensors, checkpoint.stored), len(files))
        return 0
    if args.save is None:
        raise ValueError("--save is required, unless --dry-run only looks")
    return _build(reshard_build(checkpoint, files, args.save, target.note, not args.drop_optimizer,
                                not args.no_verify), share)


def _print_reads(reads: "dict[int, Reads]", new_files: int) -> None:
    """Print what ranks read of the files as they are; after resharding each reads its own shards, and nothing else."""
    opened = [len(each.files) for each in reads.values()]
    print(f"{len(reads)} ranks, {new_files} files after resharding")
    print(f"files that a rank opens now: {max(opened)} at most, {sum(opened) / len(opened):.1f} on average")
    print(f"bytes of a rank's own shards: {max(each.own for each in reads.values()):,} at most; of the stored items "
          f"that hold them, which DCP's own reader reads whole: {max(each.items for each in reads.values()):,}")


def merge(args: argparse.Namespace, share: Share) -> int:
    checkpoint = open_checkpoint(args.load, args.ckpt_step)
    tensors = tensors_to_write(checkpoint, DTYPES.get(args.dtype), not args.drop_optimizer)
    files = files_of_size(tensors, checkpoint, args.max_file_size)
    return _build(reshard_build(checkpoint, files, args.save, None, not args.drop_optimizer,
                                not args.no_verify), share)


def average(args: argparse.Namespace, share: Share) -> int:
    checkpoints = [open_checkpoint(directory) for directory in args.directories]
    weights = args.weights or [1.0] * len(checkpoints)
    if len(weights) != len(checkpoints):
        raise ValueError(f"--weights has {len(weights)} numbers for {len(checkpoints)} checkpoints")
    if not sum(weights) > 0:
        raise ValueError(f"--weights {' '.join(map(str, weights))} add up to {sum(weights):g}, not to more than 0")
    tensors = tensors_to_write(checkpoints[0], DTYPES.get(args.dtype), False)
    files = files_of_size(tensors, checkpoints[0], _AVERAGE_FILE_BYTES)
    return _build(average_build(checkpoints, weights, files, args.save, TrainState(), not args.no_verify), share)


def _build(build: DirectoryBuild, share: Share) -> int:
    build_with_progress(build, share)
    if share.rank == 0:
        print(f"{build.destination}: {build.nbytes:,} bytes in {len(build.files)} files")
    return 0


def diff(args: argparse.Namespace, share: Share) -> int:
    a, b = open_checkpoint(args.a), open_checkpoint(args.b)
    names = [name for name in a.stored.shapes | b.stored.shapes if name.startswith(WEIGHTS) or not args.weights_only]
    total = sum(item.region.numel * item.dtype.itemsize for name in names if name in b.stored.shapes
                for item in a.stored.items.get(name, ()))
    with progress(total) as bar:
        found = compare(a, b, names, args.workers, bar.update)
    different = [each for each in found if each.reason is not None]
    if args.json:
        print(json.dumps({"a": str(a.directory), "b": str(b.directory), "tensors": [asdict(each) for each in found]},
                         indent=2))
    else:
        _print_differences(found if args.all else different)
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(each.reason for each in different).items())
        print(f"{len(found) - len(different)} of {len(found)} tensors are bit for bit the same" +
              (f"; {len(different)} are not: {reasons}" if different else ""))
    return 1 if different else 0


def _print_differences(rows: list[Difference]) -> None:
    width = max((len(each.name) for each in rows), default=0)
    for each in rows:
        text = {None: "the same", "numbers": "", "dtype": f"{each.detail}; "}.get(each.reason, f"{each.reason} "
                                                                                  f"{each.detail}".strip())
        if each.reason in ("numbers", "dtype"):
            text += (f"{each.different:,} numbers, largest |a - b| {each.largest:.3g}, relative {each.relative:.3g}")
        print(f"{each.name:{width}}  {text}")


COMMANDS = {"inspect": inspect, "verify": verify, "reshard": reshard, "merge": merge, "average": average, "diff": diff}
