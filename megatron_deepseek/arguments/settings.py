"""Turns arguments that fit together into frozen settings, one dataclass for each concern."""

import argparse
import contextlib
import io
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_deepseek.arguments import auto_layout
from megatron_deepseek.arguments.architecture import build_model, describe_architecture, unpadded_vocab_size
from megatron_deepseek.arguments.data_paths import data_arguments, data_paths
from megatron_deepseek.arguments.base_weights import base_settings
from megatron_deepseek.arguments.distillation import distillation_settings, logit_cache_settings
from megatron_deepseek.arguments.grpo import grpo_settings
from megatron_deepseek.arguments.lora import lora_settings
from megatron_deepseek.arguments.notices import notices
from megatron_deepseek.arguments.parser import RECOMPUTE_MODULES, build_parser
from megatron_deepseek.arguments.preference import is_reward, preference_settings
from megatron_deepseek.arguments.problems import Problems, problems_of
from megatron_deepseek.arguments.request import Request
from megatron_deepseek.arguments.validation import check, check_auto_layout
from megatron_deepseek.arguments.words import read_words
from megatron_deepseek.launch.agent import tell_agent
from megatron_deepseek.launch.program import program
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.presets import config_file
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.settings import (
    CommunicationSettings,
    DataSettings,
    FineTuningSettings,
    LearningRateSettings,
    LossSettings,
    OffloadSettings,
    OptimizerSettings,
    PipelineSettings,
    RecomputeSettings,
    RunSettings,
    Settings,
)
from megatron_deepseek.training import schedules, timeline

# torchrun stops all ranks of a node as soon as one exits, so the silent ones wait while rank 0 prints.
SILENT_SECONDS = 10.0


def parse(argv: Sequence[str], world_size: int, local_world_size: int | None = None,
          parser: Callable[[], argparse.ArgumentParser] = build_parser) -> Settings:
    """Return the settings of the command line `argv` on `world_size` ranks, `local_world_size` of them on each node.

    `parser` makes the parser of a task. Raise ValueError for a user's mistakes, with all that can be found at once.
    --help prints and raises SystemExit(0), as argparse does.
    """
    read = read_words(argv, parser())
    problems = list(read.problems)
    try:
        if read.whole:
            settings = build_settings(read.args, world_size, local_world_size)
            if not problems:
                return replace(settings, notes=(*read.notes, *settings.notes))
        else:
            check(Request(read.args, _architecture(read.args), world_size, local_world_size))
    except ValueError as error:
        problems += read.new(problems_of(error))
    raise Problems(problems)


def build_settings(args: argparse.Namespace, world_size: int, local_world_size: int | None = None) -> Settings:
    """Return the settings that parsed arguments ask for; with --auto-layout the layout is the planner's. Raise
    ValueError if they do not fit together.
    """
    if args.auto_layout is not None:
        check_auto_layout(Request(args, _architecture(args), world_size, local_world_size))
        values = auto_layout.chosen(build_settings, args, world_size, local_world_size)
        found = auto_layout.accept_for(build_settings, args, world_size, local_world_size)(values)
        return replace(found, notes=(*found.notes, auto_layout.describe(args, values)))
    try:
        request = Request(args, _architecture(args), world_size, local_world_size)
        check(request)
        run = _run(request)
        learning_rate = _learning_rate(request)
        schedules.check_learning_rate(learning_rate)
        if _begins(request):
            schedules.schedule_of(learning_rate, run, request.batch)
    except ValueError as error:
        raise Problems(map(_with_options, problems_of(error))) from error
    return Settings(
        model=request.model, layout=_layout(request), learning_rate=learning_rate, batch=request.batch,
        pipeline=PipelineSettings(request.schedule, request.layout, request.virtual_stages),
        optimizer=_fill(OptimizerSettings, args, lora_plus_ratio=args.lora_plus_ratio or 1.0),
        loss=_loss(request), recompute=_recompute(request),
        communication=_fill(CommunicationSettings, args, moe_ranks_per_node=request.ranks_per_node),
        offload=_fill(OffloadSettings, args), data=_data(request), run=run,
        fine_tuning=_fine_tuning(request) if request.fine_tunes else None,
        **(grpo_settings(args) if request.reinforces else {}), lora=lora_settings(args),
        base=base_settings(args),
        notes=(*describe_architecture(args, request.model), *notices(request)))


def parse_or_exit(argv: Sequence[str], environ: Mapping[str, str],
                  parser: Callable[[], argparse.ArgumentParser] = build_parser) -> Settings:
    """Parse for an entry point: rank 0 alone prints what is wrong, and every rank leaves with status 2."""
    first = environ.get("RANK", "0") == "0"
    with contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()):  # --help, once
        try:
            world_size = int(environ.get("WORLD_SIZE", "1"))
            return parse(argv, world_size, int(environ.get("LOCAL_WORLD_SIZE", world_size)), parser)
        except ValueError as error:
            line = f"{program()}: error: {error}"
            if first:
                print(_as_list(problems_of(error)), file=sys.stderr, flush=True)
            else:
                time.sleep(SILENT_SECONDS)
            tell_agent(line)
    raise SystemExit(2)


def _architecture(args: argparse.Namespace) -> ModelConfig:
    """Return the architecture of `args`. Raise Problems: of the data too, since rules are not looked at then."""
    try:
        return build_model(args)
    except ValueError as error:
        problems = list(problems_of(error))
        try:
            _ = hasattr(args, "dataset") or hasattr(args, "prompts") or data_paths(args)
        except ValueError as other:
            problems.append(str(other))
        raise Problems(problems) from error


def _as_list(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{program()}: error: {problems[0]}"
    return "\n  ".join((f"{program()}: error: {len(problems)} mistakes:", *problems))


def _with_options(message: str) -> str:
    """Return `message`, of a check that knows settings and not arguments, with options in place of field names."""
    return re.sub(r"(?<![\w-])(lr(?:_\w+)?|min_lr|rampup_batch_size|global_batch_size)\b",
                  lambda name: "--" + name.group().replace("_", "-"), message)


def _begins(request: Request) -> bool:
    """Return whether this is a first start for sure, so that the lengths of its schedule can be checked now.

    The length of a resumed run depends on the batches that it had, and rank 0 decides whether a run resumes
    (runtime/decision.py): parsing looks at no checkpoint.
    """
    return request.args.load is None and request.args.save is None and getattr(request.args, "epochs", None) is None


def _fill(kind: type, args, **given):
    """Make settings of class `kind` from the arguments of the same names."""
    names = [name for name in kind.__dataclass_fields__ if name not in given and hasattr(args, name)]
    return kind(**{name: getattr(args, name) for name in names}, **given)


def _layout(request: Request) -> Layout:
    return Layout(dp=request.dp, pp=request.pp, tp=request.tp, ep=request.ep,
                  cp=request.cp, etp=request.args.expert_tensor_parallel_size,
                  sequence_parallel=request.args.sequence_parallel and request.tp > 1)


def _learning_rate(request: Request) -> LearningRateSettings:
    args = request.args
    v3 = args.lr_decay_style == "deepseek-v3"
    min_lr = (args.lr / 10 if v3 else 0.0) if args.min_lr is None else args.min_lr
    final = args.lr * 7.3e-6 / 2.2e-4 if args.lr_final is None else args.lr_final
    return _fill(LearningRateSettings, args, min_lr=min_lr, lr_final=final)


def _loss(request: Request) -> LossSettings:
    args = request.args
    rate = args.moe_router_bias_update_rate
    kind, coefficient = request.balance
    return _fill(LossSettings, args, balance_type=kind, moe_aux_loss_coeff=coefficient,
                 moe_token_drop_policy=args.moe_token_drop_policy or "probs",
                 moe_router_bias_update_rate=_usual_bias_rate(request) if rate is None else rate)


def _usual_bias_rate(request: Request) -> float:
    """Return V3's rate in pre-training. Other entries leave the routers' biases, as the end of V3's pre-training did,
    and so does LoRA.
    """
    has_bias = request.model.n_routed_experts > 0 and request.model.topk_method == "noaux_tc"
    return 1e-3 if has_bias and request.pretrains and request.args.lora_rank is None else 0.0


def _recompute(request: Request) -> RecomputeSettings:
    granularity, modules = request.args.recompute_granularity, request.args.recompute_modules
    has = [module for module in RECOMPUTE_MODULES if request.model.n_routed_experts or module != "moe_act"]
    default = tuple(has) if granularity == "selective" else ()
    return RecomputeSettings(granularity, tuple(modules) if modules else default)


def _data(request: Request) -> DataSettings:
    data_path, split_data_paths = data_paths(request.args) if request.pretrains else ((), None)
    return _fill(DataSettings, request.args, data_path=data_path, split_data_paths=split_data_paths,
                 tokenizer_model=_tokenizer_model(request), **_reading(request),
                 data_arguments=data_arguments(request.args) if request.pretrains else ())


def _reading(request: Request) -> dict[str, Any]:
    """Return how pre-training reads its data; of fine-tuning --num-workers are processes that tokenise."""
    if not request.pretrains:
        return {"num_workers": DataSettings.num_workers}
    return {"validation_set_names": tuple(request.args.validation_set_names or ())}


def _tokenizer_model(request: Request) -> str | None:
    """Return --tokenizer-model. The NullTokenizer, whose number of ids it is, has by default the whole vocabulary, of
    which the last row is the end of a document.
    """
    args = request.args
    if args.tokenizer_type != "NullTokenizer" or args.tokenizer_model is not None:
        return args.tokenizer_model
    return str((args.vocab_size or request.model.vocab_size) - 1)


def _fine_tuning(request: Request) -> FineTuningSettings:
    args = request.args
    return _fill(FineTuningSettings, args, dataset=tuple(args.dataset), eval_dataset=tuple(args.eval_dataset or ()),
                 preference=preference_settings(args), distillation=distillation_settings(args),
                 logit_cache=logit_cache_settings(args))


def _run(request: Request) -> RunSettings:
    args = request.args
    eval_iters = args.eval_iters or 0
    evaluates = bool(args.eval_dataset) and args.eval_iters != 0 if request.fine_tunes else \
        bool(args.eval_prompts) if request.reinforces else request.evaluates
    run = _fill(RunSettings, args, eval_iters=eval_iters,
                eval_interval=(args.eval_interval or 1000) if evaluates else None,
                eval_tasks=tuple(args.eval_tasks or ()),
                eval_tasks_interval=args.eval_tasks_interval or RunSettings.eval_tasks_interval,
                finetune=args.finetune or _begins_from_weights(request), train_iters=args.train_iters or 0,
                drop_mtp=args.num_nextn_predict_layers == 0 or is_reward(args),
                max_skipped_steps=args.max_skipped_steps or RunSettings.max_skipped_steps,
                freeze_parameters=tuple(args.freeze_parameters or ()),
                unpadded_vocab_size=unpadded_vocab_size(args), sharding=args.data_parallel_sharding_strategy,
                model_file=None if args.model is None else config_file(args.model))
    return replace(run, train_iters=timeline.last_iteration(run, request.batch))


def _begins_from_weights(request: Request) -> bool:
    """Return whether the first start of another task than pre-training, or of a training of adapters, takes weights
    alone; a --load that is --save is its own run.
    """
    load, save = request.args.load, request.args.save
    weights_alone = not request.pretrains or request.args.lora_rank is not None
    return weights_alone and load is not None and (save is None or load.resolve() != save.resolve())
