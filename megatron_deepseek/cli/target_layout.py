"""The layout that `reshard_checkpoint.py reshard` is asked for, resolved and checked as training does it."""

import argparse
from dataclasses import dataclass
from typing import Any

from megatron_deepseek.arguments.parser import build_parser as training_parser
from megatron_deepseek.arguments.settings import build_settings
from megatron_deepseek.checkpoint.native import CONFIG, Checkpoint, layout_note
from megatron_deepseek.checkpoint.reshard.rank_shards import ModelDivision
from megatron_deepseek.planning.pipeline_balance import resolve

_USUAL_LENGTH = 4096  # tokens of a sequence, if neither --seq-length nor layout.json says it


@dataclass(frozen=True)
class TargetLayout:
    """The layout to reshard for: `division` decides which rank holds what, `note` becomes layout.json."""

    division: ModelDivision
    note: dict


def resolve_target_layout(args: argparse.Namespace, given: dict[str, Any], checkpoint: Checkpoint) -> TargetLayout:
    """Resolve the layout of the options `given`, with the number of ranks and --seq-length from `args`.

    Raise ValueError if training would refuse the layout for this model.
    """
    others = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.world_size is not None and args.world_size % others:
        raise ValueError(f"--world-size {args.world_size} is not a multiple of the {others} ranks of "
                         f"--tensor-model-parallel-size {args.tensor_model_parallel_size} x "
                         f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} x "
                         f"--context-parallel-size {args.context_parallel_size}")
    data_ranks = args.world_size // others if args.world_size is not None else args.data_parallel_size or 1
    any_batch = 4 * data_ranks * args.pipeline_model_parallel_size  # every schedule accepts it
    training = training_parser().parse_args(["--model", str(checkpoint.directory / CONFIG), "--data-path", "none",
                                             "--train-iters", "1", "--global-batch-size", str(any_batch)])
    length = args.seq_length or (checkpoint.layout or {}).get("seq_length") or \
        min(_USUAL_LENGTH, checkpoint.config.max_position_embeddings)
    settings = build_settings(argparse.Namespace(**vars(training) | given | {"seq_length": length}),
                              data_ranks * others)
    stages = resolve(checkpoint.config, settings.pipeline, settings.layout.pp, length)
    return TargetLayout(ModelDivision(checkpoint.config, settings.layout, stages, settings.pipeline.schedule),
                        layout_note(settings.layout, stages, settings.pipeline.schedule, length))
