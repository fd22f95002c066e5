"""What tools/merge_lora.py does with its arguments; apart from merge_lora.py, which must not import torch."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_deepseek.checkpoint.adapter.base import holds_adapters
from megatron_deepseek.checkpoint.adapter.export import ADAPTER
from megatron_deepseek.checkpoint.adapter.for_vllm import is_applied, unapplied, write_for_vllm
from megatron_deepseek.checkpoint.adapter.merging import MergedSource, Weighted, merged
from megatron_deepseek.checkpoint.adapter.peft_files import CONFIG, Adapter
from megatron_deepseek.checkpoint.convert.conversion import DTYPES, conversion_build
from megatron_deepseek.checkpoint.convert.formats import hf_output, open_hf, open_native
from megatron_deepseek.checkpoint.loadable import checkpoint_directory
from megatron_deepseek.checkpoint.tracker import is_huggingface, last_iteration
from megatron_deepseek.cli.checkpoint_options import build_with_progress, share_of


def merge(args: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Merge, or do this rank's share of it; raise ValueError for a user's mistake."""
    if not args.base.is_dir():
        raise ValueError(f"--base {args.base} is not a directory")
    base, assets = (open_hf if is_huggingface(args.base) else open_native)(args.base, without_mtp=False)
    chosen = parse_adapters(args.adapter)
    check_reader(args, chosen)
    mtp = base.config.num_nextn_predict_layers > 0
    adapters = [Weighted(Adapter.read(adapter_in(path), mtp=mtp), weight) for path, weight in chosen]
    if args.adapter_for is not None:
        adapters = [replace(each, adapter=unapplied_part(each.adapter)) for each in adapters]
    source = merged(base, adapters)
    output = hf_output(source, assets, args.save, DTYPES[args.dtype] if args.dtype else None, args.max_shard_size,
                       changed=source.pairs)
    build = conversion_build(source, output)
    weights = [weight for _, weight in chosen]
    share = share_of(environ, args.workers)
    build_with_progress(replace(build, what="merge", contents=[build.contents, weights]), share)
    if share.rank == 0:
        _report(source, args.save, output.nbytes, adapters)
        if args.adapter_for is not None:
            write_for_vllm(adapters[0].adapter.directory, args.save_adapter, str(args.save))
            print(f"{args.save_adapter}: the other layers, as an adapter of {args.save} for vLLM")


def check_reader(args: argparse.Namespace, chosen: Sequence[tuple[Path, float]]) -> None:
    """Raise ValueError for options of a reader of adapters that do not go together."""
    if (args.adapter_for is None) != (args.save_adapter is None):
        raise ValueError("--adapter-for and --save-adapter need each other")
    if args.adapter_for is None:
        return
    if [weight for _, weight in chosen] != [1.0]:
        raise ValueError(f"--adapter-for {args.adapter_for} takes one adapter, without a weight")
    directory = args.save_adapter
    if directory.exists() and (not directory.is_dir() or any(not path.name.startswith("adapter_")
                                                             for path in directory.iterdir())):
        raise ValueError(f"--save-adapter {directory} exists already and holds something else than an adapter")


def unapplied_part(adapter: Adapter) -> Adapter:
    """Return what vLLM does not apply of an adapter. Raise ValueError if it applies all, or nothing."""
    left = {layer: adapter.pairs[layer] for layer in unapplied(adapter.directory) if layer in adapter.pairs}
    if not left:
        raise adapter.fault("has nothing that vLLM does not apply: it is one for vLLM as it is")
    if not any(map(is_applied, adapter.pairs)):
        raise adapter.fault("adapts kv_b_proj alone: merge it without --adapter-for")
    return replace(adapter, pairs=left)


def parse_adapters(words: Sequence[str]) -> list[tuple[Path, float]]:
    """Return the directories and their weights, 1 where none are given. Raise ValueError for a mix of both."""
    if _number(words[0]) is None:
        wrong = next((word for word in words if _number(word) is not None), None)
        if wrong is not None:
            raise ValueError(f"--adapter {' '.join(words)}: the first has no weight, so {wrong} must be a directory")
        return [(Path(word), 1.0) for word in words]
    if len(words) % 2:
        raise ValueError(f"--adapter {' '.join(words)}: weights and directories must take turns")
    pairs = []
    for weight, directory in zip(words[::2], words[1::2]):
        number = _number(weight)
        if number is None or _number(directory) is not None:
            raise ValueError(f"--adapter {' '.join(words)}: weights and directories must take turns")
        pairs.append((Path(directory), number))
    return pairs


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def adapter_in(path: Path) -> Path:
    """Return the directory of PEFT's files: `path`, or that of a checkpoint, or of the last of --save."""
    if (path / CONFIG).is_file() or not path.is_dir():
        return path
    directory = path if holds_adapters(path) or last_iteration(path) is None else checkpoint_directory(path)
    return directory / ADAPTER if holds_adapters(directory) else path


def _report(source: MergedSource, save: Path, nbytes: int, adapters: Sequence[Weighted]) -> None:
    for each in adapters:
        print(f"{each.adapter.directory}: {len(each.adapter.pairs)} layers, times {each.weight:g}")
    print(f"{save}: {len(source.pairs)} of {len(source.shapes)} tensors are merged, {nbytes:,} bytes"
          + ("; FP8 weights among them have new scales" if source.rescales else ""))
