"""What evaluate.py does once its arguments are right: the model loaded, rank 0 asking, the other ranks following."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_deepseek.cli import inference_options as options
from megatron_deepseek.evaluation import harness, pass_at_k
from megatron_deepseek.evaluation.chats import Chats
from megatron_deepseek.evaluation.engine_model import EngineModel
from megatron_deepseek.evaluation.kept_answers import ResumedModel, checkpoint_digest
from megatron_deepseek.evaluation.perplexity import perplexity_of
from megatron_deepseek.evaluation.questions import EvaluatedModel
from megatron_deepseek.inference.loading import checked_length, join_ranks, load_model
from megatron_deepseek.inference.model_files import ModelFiles
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.sandbox.run import Limits, isolation

USUAL_LENGTH = 8192  # tokens of a text, for models that can see more
_IDLE_MINUTES = 24 * 60  # for which other ranks wait for rank 0, which loads data sets and runs programs


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate what was asked for, and print and write the results.

    Raise ValueError or OSError, of one line, for what cannot be.
    """
    files = options.open_files(args)
    length = checked_length(files.config, args.seq_length)
    length = length if args.seq_length else min(length, USUAL_LENGTH)
    chats = _chats(args, files) if args.apply_chat_template else Chats()
    _check_programs(args)
    tasks, problems = _tasks(args), None if args.pass_at_k is None else _problems(args)
    model = load_model(files, join_ranks(options.layout_of(args), _IDLE_MINUTES), options.load_settings(args, length))
    replicas = Replicas(model, options.engine_settings(args, length))
    options.warm_up(args, replicas)
    if not replicas.leads:
        replicas.follow()
        return
    with replicas, _kept(EngineModel(replicas), args, files) as asked:
        if tasks is not None:
            _run_tasks(asked, tasks, args, chats)
        if args.perplexity is not None:
            _run_perplexity(asked, args)
        if problems is not None:
            _run_programs(asked, problems, args)


@contextmanager
def _kept(model: EvaluatedModel, args: argparse.Namespace, files: ModelFiles) -> Iterator[EvaluatedModel]:
    """Keep the model's answers beside the results, where there is a place for these."""
    if args.output is None:
        yield model
        return
    digest = checkpoint_digest(files.directory, args.adapter, args.dtype, args.weights, args.double_quantization,
                               model.max_length)
    resumed = ResumedModel(model, _beside(args.output, "answers.jsonl"), digest, partial(print, file=sys.stderr))
    try:
        yield resumed
    finally:
        resumed.close()


def _beside(output: Path, name: str) -> Path:
    """Return a file of the results' folder, or with FILE.json one whose name begins as its."""
    return output.with_name(f"{output.stem}.{name}") if output.suffix == ".json" else output / name


def _chats(args: argparse.Namespace, files: ModelFiles) -> Chats:
    """Return the model's chat template. Raise ValueError where it has none."""
    chat = options.chat_format(args, files, args.thinking)

    def render(messages: Sequence[Mapping[str, str]], asks: bool) -> str:
        last = {} if asks else {"prefix": True}
        body = {"messages": [*messages[:-1], {**messages[-1], **last}]}
        return files.tokenizer.decode(list(chat.question(body).prompt))

    return Chats(chat.name, render)


# Tasks ----------------------------------------------------------------------------------------------------------------

def _evaluated(args: argparse.Namespace) -> harness.Evaluated:
    return harness.Evaluated(
        tuple(name for each in args.tasks for name in each.split(",") if name), args.num_fewshot, args.limit,
        args.apply_chat_template, args.fewshot_as_multiturn, args.system_instruction, args.include_path,
        args.confirm_run_unsafe_code)


def _tasks(args: argparse.Namespace) -> list | None:
    """Return the tasks with their data on rank 0, before the model is loaded; None where there are none."""
    if args.tasks is None:
        return None
    harness.check_installed("--tasks")
    return harness.load_tasks(_evaluated(args)) if options.leads() else []


def _run_tasks(model: EvaluatedModel, tasks: list, args: argparse.Namespace, chats: Chats) -> None:
    described = {"pretrained": str(args.load), **({"step": args.ckpt_step} if args.ckpt_step is not None else {})}
    results, path = harness.evaluate(model, tasks, _evaluated(args), described, chats, args.output)
    print(harness.table(results))
    _say_written(path)


# Perplexity -----------------------------------------------------------------------------------------------------------

def _run_perplexity(model: EvaluatedModel, args: argparse.Namespace) -> None:
    with tqdm(desc="perplexity", unit="token", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        found = perplexity_of(model, args.perplexity, args.stride, args.json_key, bar.update)
    record = {"file": str(args.perplexity), "model": str(args.load), "stride": args.stride or model.max_length,
              "max_length": model.max_length, **found.record()}
    for name, value in record.items():
        print(f"{name:>18}  {value:,.6g}" if isinstance(value, float) else f"{name:>18}  {value}")
    if args.output is not None:
        _say_written(_write_record(_beside(args.output, "perplexity.json"), record))


# Programs -------------------------------------------------------------------------------------------------------------

def _check_programs(args: argparse.Namespace) -> None:
    """Raise ValueError where programs are to be run, and this machine cannot isolate them."""
    if args.pass_at_k is None:
        return
    found = isolation()
    if not found.namespaces and not args.unisolated:
        raise ValueError(f"--pass-at-k runs programs that a model wrote, and this machine cannot isolate them "
                         f"({found.why}); --unisolated runs them with limits alone")
    if not found.namespaces or not found.processes:
        missing = "neither network nor files are closed to programs" if not found.namespaces else \
            "programs can start any number of processes within their time"
        print(f"warning: {missing} ({found.why})", file=sys.stderr)


def _problems(args: argparse.Namespace) -> list[pass_at_k.Problem]:
    problems = pass_at_k.read_problems(args.pass_at_k)
    if args.limit is None:
        return problems
    return problems[:max(1, round(args.limit * len(problems)) if args.limit < 1 else int(args.limit))]


def _run_programs(model: EvaluatedModel, problems: list[pass_at_k.Problem], args: argparse.Namespace) -> None:
    sampling = SamplingParameters(max_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                                  n=args.samples, seed=args.seed, stop=tuple(args.stop))
    with tqdm(total=len(problems), desc="programs written", unit="problem", disable=None, dynamic_ncols=True) as bar:
        completions = pass_at_k.complete(model, problems, sampling, bar.update)
    limits, samples = Limits(seconds=args.program_seconds, memory_bytes=args.program_memory), []
    total = len(problems) * args.samples
    with tqdm(total=total, desc="programs run", unit="program", disable=None, dynamic_ncols=True) as bar:
        for sample in pass_at_k.judge(problems, completions, limits, args.workers, args.unisolated):
            samples.append(sample)
            bar.update()
    record = {"file": str(args.pass_at_k), "model": str(args.load), "temperature": args.temperature,
              **pass_at_k.summary(samples, args.k)}
    for name, value in record.items():
        print(f"{name:>12}  {value:.4f}" if isinstance(value, float) else f"{name:>12}  {value}")
    if args.output is not None:
        lines = "".join(json.dumps(each.record(), ensure_ascii=False) + "\n" for each in samples)
        _beside(args.output, "programs.jsonl").write_text(lines, encoding="utf-8")
        _say_written(_write_record(_beside(args.output, "pass_at_k.json"), record))


def _write_record(path: Path, record: Mapping) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _say_written(path: Path | None) -> None:
    if path is not None:
        print(f"written to {path}")
