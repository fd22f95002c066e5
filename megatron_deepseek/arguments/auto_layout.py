"""--auto-layout GPU: the planner's best layout for a run's model, batch and number of ranks, in place of arguments.

Every rank searches by itself and finds the same, since the search depends on nothing but the arguments and the number
of ranks (planning/search.py). It imports no torch. What it proposes has gone through validation.py, as if typed.
"""

import argparse
import shlex
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from megatron_deepseek.model.architecture.presets import load_config
from megatron_deepseek.planning.candidates import Choice, Lane, options, words
from megatron_deepseek.settings import Settings

# arguments/settings.py: build_settings, which is given since it calls this module.
BuildSettings = Callable[[argparse.Namespace, int, int | None], Settings]


@lru_cache(1)
def _names() -> tuple[str, ...]:
    return tuple(options(Choice(Lane()), load_config("tiny"), 1))


def defaults(without: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments that a search decides with their defaults, but for those in `without`."""
    from megatron_deepseek.arguments.parser import build_parser

    parser = build_parser()
    return {name: parser.get_default(name) for name in _names() if name not in (without or {})}


def given_beside(args: argparse.Namespace) -> str:
    """Return the options of a layout that were given beside --auto-layout, "" if there is none."""
    names = (*_names(), "num_layers_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers",
             "decoder_last_pipeline_num_layers", "account_for_embedding_in_pipeline_split",
             "account_for_loss_in_pipeline_split")
    usual = defaults()
    return " ".join(f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != usual.get(name)
                    and name != "moe_ranks_per_node")


def accept_for(build: BuildSettings, args: argparse.Namespace, world_size: int, local_world_size: int | None
               ) -> Callable[[Mapping[str, Any]], Settings]:
    """Return the function that has `build` make settings of `args` with other values, or raises ValueError."""

    def accept(values: Mapping[str, Any]) -> Settings:
        return build(argparse.Namespace(**{**vars(args), **values, "auto_layout": None}), world_size,
                     local_world_size)

    return accept


def chosen(build: BuildSettings, args: argparse.Namespace, world_size: int, local_world_size: int | None
           ) -> Mapping[str, Any]:
    """Return the values of the arguments of the best layout. Raise ValueError where none fits."""
    from megatron_deepseek.planning.gpus import find_gpu
    from megatron_deepseek.planning.job import Job
    from megatron_deepseek.planning.search import Search
    from megatron_deepseek.planning.search_report import nothing_fits

    try:
        gpu = find_gpu(args.auto_layout)
    except ValueError as error:
        words_ = str(error).replace("--gpu ", "--auto-layout ", 1).removesuffix("; --gpu-file adds others")
        raise ValueError(words_) from error
    local = local_world_size or min(world_size, gpu.scale_up_gpus)
    alone = accept_for(build, args, 1, 1)({})  # without a layout: what stays the same in all of them
    accept = accept_for(build, args, world_size, local)
    found = Search(Job(alone), gpu, gpu.memory_bytes, world_size, accept, per_node=local).run()
    if not found.plans:
        raise ValueError(f"--auto-layout {args.auto_layout}: " + " ".join(
            nothing_fits(found, gpu, gpu.memory_bytes, world_size)))
    return found.plans[0].values


def describe(args: argparse.Namespace, values: Mapping[str, Any]) -> str:
    """Return a line on what was chosen, as arguments that give the same without a search."""
    return f"--auto-layout {args.auto_layout} is {shlex.join(words(values, defaults()))}"
