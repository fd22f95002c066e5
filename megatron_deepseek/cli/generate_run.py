"""What generate.py does once its arguments are right: prompts to requests, requests to answers."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

from tqdm import tqdm

from megatron_deepseek.cli import inference_options as options
from megatron_deepseek.cli.answers_file import AnswersFile, cut_and_read, record
from megatron_deepseek.cli.generate_prompts import PromptLine, PromptReader
from megatron_deepseek.inference.asking import AHEAD, Asked, answer_all
from megatron_deepseek.inference.loading import checked_length, join_ranks, load_model
from megatron_deepseek.inference.model_files import ModelFiles
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters


def read_prompts(args: argparse.Namespace, files: ModelFiles) -> list[PromptLine]:
    """Return what is asked, checked against the model. Raise ValueError of one line for what cannot be."""
    parameters = replace(files.defaults, seed=args.seed, **options.sampling_options(args))
    limit = checked_length(files.config, args.seq_length)
    chat = cache(partial(options.chat_format, args, files))
    made_by = json.dumps([str(files.directory.resolve()), str(args.adapter), args.dtype, args.weights])
    reader = PromptReader(files.tokenizer, chat, parameters, made_by, partial(_check, files, limit))
    if args.prompts is not None:
        lines = reader.lines(args.prompts)
        if not lines:
            raise ValueError(f"--prompts {args.prompts} has no line with a prompt")
        return lines
    return [replace(reader.line(1, {"prompt": args.prompt}), parameters=parameters)]


def _check(files: ModelFiles, limit: int, ids: Sequence[int], parameters: SamplingParameters) -> None:
    """Raise ValueError for a prompt that the model cannot be asked."""
    vocab_size = files.config.vocab_size
    if not ids:
        raise ValueError("the prompt is empty: it must have at least one token")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(each for each in ids if not 0 <= each < vocab_size)
        raise ValueError(f"the prompt has id {wrong}, but {files.directory} has vocab_size {vocab_size}")
    if len(ids) >= limit:
        raise ValueError(f"the prompt has {len(ids)} tokens, and --seq-length {limit} must leave room for one more")


def answered(args: argparse.Namespace, lines: Sequence[PromptLine]) -> set[int]:
    """Return the numbers of the lines that --output has answers to, which was cut where it was torn."""
    return cut_and_read(args.output, lines) if args.output is not None else set()


def build(args: argparse.Namespace, files: ModelFiles, lines: Sequence[PromptLine]) -> Replicas:
    """Join the ranks, load the model, and make an engine that has room for the longest of `lines`."""
    limit = checked_length(files.config, args.seq_length)
    needed = max(len(line.ids) + line.parameters.max_tokens for line in lines)
    max_length = max(min(limit, needed), 2)
    meshes = join_ranks(options.layout_of(args))
    model = load_model(files, meshes, options.load_settings(args, max_length))
    replicas = Replicas(model, options.engine_settings(args, max_length))
    options.warm_up(args, replicas)
    return replicas


def answer(args: argparse.Namespace, replicas: Replicas, lines: Sequence[PromptLine], done: int) -> None:
    """Print the answer to --prompt, or write those to the lines of --prompts."""
    if args.prompts is None:
        (line,) = lines
        for output in replicas.generate([line.ids], line.parameters)[0]:
            text = output.text if args.prompt else output.text.removeprefix(" ")  # nothing is before the first word
            print(args.prompt + text)
        return
    file = AnswersFile(args.output, partial(print, file=sys.stderr)) if args.output is not None else None
    with tqdm(total=done + len(lines), initial=done, unit="prompt", disable=None, dynamic_ncols=True) as bar:
        tokens = 0
        asked = (Asked(line, line.ids, line.parameters) for line in lines)
        for line, outputs in answer_all(replicas, asked, AHEAD * args.max_running):
            if file is None:
                print(json.dumps(record(line, outputs), ensure_ascii=False), flush=True)
            else:
                file.write(line, outputs)
            tokens += sum(len(each.tokens) for each in outputs)
            bar.update()
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
    if file is not None:
        file.close()
    _say_drafts(replicas)


def _say_drafts(replicas: Replicas) -> None:
    """Say how many drafts were right, by their place, if any were made."""
    statistics = replicas.statistics
    if any(statistics.drafts_proposed):
        shares = " ".join(f"{accepted / proposed:.1%}" for accepted, proposed in zip(
            statistics.drafts_accepted, statistics.drafts_proposed) if proposed)
        print(f"drafts accepted, by their place: {shares}", file=sys.stderr)
