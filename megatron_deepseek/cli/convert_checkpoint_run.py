"""What tools/convert_checkpoint.py does with its arguments.

It is apart from convert_checkpoint.py, which parses them, because that file must not import torch.
"""

import argparse
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path


from megatron_deepseek.checkpoint.convert.assets import Assets
from megatron_deepseek.checkpoint.convert.blocks import FP8
from megatron_deepseek.checkpoint.convert.conversion import DTYPES, OutputFormat, conversion_build, dtype_bytes
from megatron_deepseek.checkpoint.convert.formats import OPEN, hf_output, megatron_output, native_output
from megatron_deepseek.checkpoint.convert.names import layer_of
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.convert.tokenizer_files import JSON, check_template, read_token_ids, tokenizer_in
from megatron_deepseek.checkpoint.dcp.metadata import METADATA
from megatron_deepseek.checkpoint.tracker import TRACKER
from megatron_deepseek.cli.checkpoint_options import build_with_progress, share_of
from megatron_deepseek.model.architecture import hf_config
from megatron_deepseek.packages import how_to_install


HF_SHARD_BYTES = 5 * 10**9


def plan_output(args: argparse.Namespace, source: TensorSource, assets: Assets) -> OutputFormat:
    """Return what --to, --save, --dtype, --fp8-scale-format and --max-shard-size ask to write.

    Raise ValueError for a format of scales without FP8 weights.
    """
    save = args.save or Path("output")
    if args.to == "gguf":
        return _plan_gguf(args, source, assets, save)
    if args.gguf_pre_tokenizer or args.dtype == "q8_0":
        raise ValueError(f"--gguf-pre-tokenizer and --dtype q8_0 are about GGUF files, not --to {args.to}")
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.to == "hf":
        output = hf_output(source, assets, save, dtype, args.max_shard_size or HF_SHARD_BYTES,
                           scale_format=args.fp8_scale_format)
    else:
        output = (native_output if args.to == "native" else megatron_output)(source, assets, save, dtype)
    if args.fp8_scale_format and FP8 not in dtype_bytes(output.files):
        raise ValueError(f"--fp8-scale-format {args.fp8_scale_format} is about FP8 weights, which --to hf --dtype fp8 "
                         f"writes")
    return output


def _plan_gguf(args: argparse.Namespace, source: TensorSource, assets: Assets, save: Path) -> OutputFormat:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"--to gguf needs the package gguf: {how_to_install('gguf')}")
    if args.dtype == "fp8" or args.fp8_scale_format:
        raise ValueError("--dtype fp8 and --fp8-scale-format: GGUF has no FP8 weights; --dtype q8_0 has 8 bits")
    from megatron_deepseek.checkpoint.gguf.output import gguf_output
    return gguf_output(source, assets, save, args.dtype, args.max_shard_size, args.gguf_pre_tokenizer)


def describe(source: TensorSource, output: OutputFormat, chosen: frozenset[int] | None) -> None:
    """Print every tensor of the `chosen` layers (None: all) with dtypes and file, then what is dropped, then totals."""
    for file in output.files:
        for tensor in file.tensors:
            if chosen is None or tensor.layer in chosen:
                stored = _name(source.dtypes[tensor.original]) if tensor.original else "computed"
                print(f"{tensor.name} {list(tensor.shape)} {stored} -> {_name(tensor.dtype)} {file.name}")
    for name, reason in sorted(source.dropped.items()):
        if chosen is None or layer_of(name) in chosen:
            print(f"{name} dropped: {reason}")
    tensors = sum(len(file.tensors) for file in output.files)
    print(f"{tensors} tensors, {output.nbytes:,} bytes in {len(output.files)} files; {len(source.dropped)} dropped, "
          f"{len(source.copies)} copies of others")


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _open(args: argparse.Namespace) -> tuple[TensorSource, Assets]:
    """Open --load; of Megatron's files, which do not say the architecture, --assets must."""
    more = (args.assets,) if args.origin == "megatron" else ()
    return OPEN[args.origin](args.load, args.no_mtp or args.to == "gguf", *more)


def _refuse_other_format(origin: str, load: Path) -> None:
    """Raise ValueError if the names of files show that `load` is of another format than --from says."""
    released = any(load.glob("*.safetensors"))
    checkpoints = (load / TRACKER).exists() or (load / METADATA).exists()
    if origin == "hf" and checkpoints and not released:
        raise ValueError(f"--load {load} holds checkpoints, not a Hugging Face model: --from native, or megatron")
    if origin != "hf" and released and not checkpoints:
        raise ValueError(f"--load {load} is a Hugging Face model: --from hf, not {origin}")


def convert(args: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Do what the arguments ask for, or this rank's share of it; raise ValueError for a user's mistake."""
    share = share_of(environ, args.workers)
    if args.origin == args.to != "hf":
        raise ValueError(f"--from {args.origin} --to {args.to} changes nothing; checkpoints are read in any layout")
    looking = args.dry_run or args.layers is not None
    if args.save is None and not looking:
        raise ValueError("--save is required, unless --dry-run or --layers only look")
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load} is not a directory")
    _refuse_other_format(args.origin, args.load)
    source, assets = _open(args)
    if args.origin == "hf" and share.rank == 0:
        for line in hf_config.describe(assets.fields, args.load / "config.json"):
            print(line)
    if args.assets is not None and args.origin != "megatron":
        assets = replace(assets, directory=args.assets, tokens=read_token_ids(args.assets))
        if not assets.files():
            raise ValueError(f"--assets {args.assets} has no tokenizer, generation_config.json or the like")
    if args.chat_template is not None:
        beside = assets.directory or args.load
        assets = replace(assets, chat_template=check_template(args.chat_template, tokenizer_in(beside), beside))
    output = plan_output(args, source, assets)
    if looking:
        describe(source, output, args.layers)
        return
    build_with_progress(conversion_build(source, output), share)
    if share.rank == 0:
        report(source, output)


def report(source: TensorSource, output: OutputFormat) -> None:
    """Print what was written, dropped and checked."""
    tensors = sum(len(file.tensors) for file in output.files)
    print(f"{output.destination}: {tensors} tensors, {output.nbytes:,} bytes in {len(output.files)} files")
    reasons = sorted(set(source.dropped.values()))
    for reason in reasons:
        names = sorted(name for name, why in source.dropped.items() if why == reason)
        print(f"dropped {len(names)} tensors ({reason}): {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")
    if source.absent_mtp:
        print(f"without MTP: {source.path} holds none of the modules that its config.json announces "
              f"(num_nextn_predict_layers {source.absent_mtp}); what was written announces none")
    if output.name == "hf" and not (output.destination / JSON).is_file():
        print(f"without a tokenizer, which servers need: {source.path} has none with it, --assets DIR brings one")
    if source.copies:
        print(f"checked {len(source.copies)} copies against their originals: {', '.join(source.copies)}")
