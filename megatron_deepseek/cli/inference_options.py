"""The options that generate.py and chat.py share: which model, how it is loaded, how it answers.

It imports no torch: mistakes are to be told at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.parser import TOKENIZER_TYPES
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.parallel.layout import Layout

if TYPE_CHECKING:
    from megatron_deepseek.inference.loading import LoadSettings
    from megatron_deepseek.inference.model_files import ModelFiles
    from megatron_deepseek.inference.replicas import Replicas
    from megatron_deepseek.serving.chat import ChatFormat

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
FORMS = ("plain", "fp8", "nf4")
# Options that are fields of SamplingParameters, with their names there.
_SAMPLING = {"max_new_tokens": "max_tokens", **{name: name for name in (
    "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "stop", "stop_token_ids", "ignore_eos", "n", "logprobs")}}


def add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--load", type=Path, required=True, metavar="DIR",
        help="checkpoints (--save of a training, of any layout), or a Hugging Face directory")
    add("--ckpt-step", type=values.count, metavar="ITERATION", help="of --load, this checkpoint instead of the last")
    add("--adapter", type=Path, metavar="DIR", help="a LoRA adapter of PEFT, kept beside the weights")
    add("--dtype", choices=DTYPES, help="what is computed in (that of most weights in the files)")
    add("--weights", choices=FORMS,
        help="how linear layers are kept: plain, fp8 (blocks as released), nf4 (4 bits) (as the files have them)")
    add("--double-quantization", action="store_true", help="with --weights nf4: quantise its scales as well")
    add("--compile", action="store_true", help="compile what layers compute between products, attention and "
        "communication; first answers take longer (docs/compile.md)")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0], help=f"({TOKENIZER_TYPES[0]})")
    add("--tokenizer-model", metavar="PATH", help="tokenizer.json or its directory (the one that is with the weights)")


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Add what SamplingParameters has, with these defaults where the model has no generation_config.json."""
    add = parser.add_argument_group("sampling", "defaults are those of the model's generation_config.json, else those "
                                                "in parentheses").add_argument
    add("--max-new-tokens", type=values.positive_int, metavar="N", help=f"longest answer ({max_new_tokens})")
    add("--min-tokens", type=values.count, metavar="N", help="no end before so many tokens (0)")
    add("--temperature", type=values.non_negative, metavar="X", help=f"0: always the likeliest token ({temperature})")
    add("--top-p", type=values.fraction, metavar="X",
        help=f"sample from the likeliest tokens of this total probability ({top_p})")
    add("--top-k", type=values.count, metavar="N", help="sample from this many likeliest tokens, 0: all (0)")
    add("--min-p", type=values.fraction, metavar="X", help="and from those of this share of the likeliest one's (0)")
    add("--repetition-penalty", type=values.positive, metavar="X", help="divide logits of tokens that were there (1)")
    add("--presence-penalty", type=float, metavar="X", help="subtract from logits of tokens that were answered (0)")
    add("--frequency-penalty", type=float, metavar="X", help="the same for each time that they were (0)")
    add("--stop", nargs="+", metavar="TEXT", help="end an answer before any of these texts")
    add("--stop-token-ids", nargs="+", type=values.count, metavar="ID", help="end it with any of these tokens")
    add("--ignore-eos", action="store_true", default=None, help="do not end it with the end of text")
    add("--seed", type=values.count, default=1234, metavar="N", help="the same seed gives the same answers (1234)")
    parser.set_defaults(usual=SamplingParameters(max_tokens=max_new_tokens, temperature=temperature, top_p=top_p))


def add_engine(parser: argparse.ArgumentParser, block_size: int = 16) -> None:
    add = parser.add_argument_group("engine").add_argument
    add("--seq-length", "--max-model-len", type=values.positive_int, metavar="N",
        help="longest prompt with its answer, in tokens (all that the model can, or what is needed)")
    add("--draft-tokens", type=values.count, default=0, metavar="N",
        help="tokens that MTP modules draft for each step; answers stay the same (0: none)")
    add("--token-budget", type=values.positive_int, default=512, metavar="N",
        help="tokens of one forward, of running answers and chunks of prompts (512)")
    add("--max-running", type=values.positive_int, default=64, metavar="N", help="requests at a time (64)")
    add("--cache-bytes", type=values.size, metavar="SIZE", help="memory of the cache, as in 4GiB (as needed, to 1GiB)")
    add("--block-size", type=values.positive_int, default=block_size, metavar="N",
        help=f"tokens of a block of it ({block_size})")
    add("--no-prefix-sharing", action="store_true", help="requests do not share blocks of equal beginnings")


def add_layout(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("parallelism", "under torchrun; what is left of the ranks is data parallel: "
                                                   "replicas that share the experts").add_argument
    add("--tensor-model-parallel-size", type=values.positive_int, default=1, metavar="N",
        help="ranks that share each matrix (1)")
    add("--expert-model-parallel-size", type=values.positive_int, default=1, metavar="N",
        help="ranks that share the experts (1)")


def leads(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is rank 0, which alone prints."""
    return environ.get("RANK", "0") == "0"


def one_voice(command: Callable[[], int]) -> int:
    """Return the status of `command`, whose words rank 0 alone prints: all ranks find the same mistakes."""
    if leads():
        return command()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return command()


def layout_of(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Layout:
    """Return the layout of the ranks that torchrun started, or of this process alone; raise ValueError if none fits."""
    world, tp = int(environ.get("WORLD_SIZE", 1)), args.tensor_model_parallel_size
    if world % tp:
        raise ValueError(f"--tensor-model-parallel-size {tp} does not divide the {world} rank{'s' * (world > 1)} of "
                         "this job; torchrun --nproc_per_node N starts more")
    if world % args.expert_model_parallel_size:
        raise ValueError(f"--expert-model-parallel-size {args.expert_model_parallel_size} does not divide the {world} "
                         f"rank{'s' * (world > 1)} of this job; torchrun --nproc_per_node N starts more")
    return Layout(dp=world // tp, tp=tp, ep=args.expert_model_parallel_size)


def open_files(args: argparse.Namespace) -> "ModelFiles":
    """Return the files of --load, checked; raise ValueError, of one line, where they cannot work."""
    from megatron_deepseek.inference.model_files import TokenizerChoice, open_model
    return open_model(args.load, args.ckpt_step, mtp=args.draft_tokens > 0,
                      tokenizer=TokenizerChoice(args.tokenizer_type, args.tokenizer_model), usual=args.usual)


def chat_format(args: argparse.Namespace, files: "ModelFiles", thinking: bool | None = None) -> "ChatFormat":
    """Return how the model is asked in a chat: --template. Raise ValueError where its tokenizer has no tokens for it.
    """
    from megatron_deepseek.serving.chat import ChatFormat
    model = args.tokenizer_model or str(getattr(files.tokenizer, "path", "")) or None
    return ChatFormat.of(files.tokenizer, model, args.template, thinking)


def load_settings(args: argparse.Namespace, max_length: int) -> "LoadSettings":
    import torch

    from megatron_deepseek.inference.loading import LoadSettings
    return LoadSettings(dtype=getattr(torch, DTYPES[args.dtype]) if args.dtype else None, form=args.weights,
                        double_quantization=args.double_quantization, max_length=max_length, adapter=args.adapter,
                        compile=args.compile)


def engine_settings(args: argparse.Namespace, max_length: int) -> EngineSettings:
    return EngineSettings(max_length, block_size=args.block_size, cache_bytes=args.cache_bytes,
                          token_budget=args.token_budget, max_running=args.max_running,
                          prefix_sharing=not args.no_prefix_sharing, draft_tokens=args.draft_tokens)


def warm_up(args: argparse.Namespace, replicas: "Replicas") -> None:
    """Make the graphs that --compile asks for before the first request, and print how long that took."""
    if args.compile:
        from megatron_deepseek.runtime.graphs import GraphWatch
        watch = GraphWatch()
        replicas.engine.warm_up()
        if leads():
            print(watch.see(), file=sys.stderr, flush=True)


def sampling_options(args: argparse.Namespace) -> dict:
    """Return what the user asked for, by the names of SamplingParameters."""
    given = {field: getattr(args, option, None) for option, field in _SAMPLING.items()}
    return {field: tuple(value) if isinstance(value, list) else value for field, value in given.items()
            if value is not None}
