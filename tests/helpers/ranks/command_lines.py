"""A case as the command line that asks for it, and the features of arguments/features.py that it then uses."""

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from cases import SEQ_LENGTH, Case

from megatron_deepseek.arguments import Settings, parse
from megatron_deepseek.arguments.features import FEATURES


def arguments_of(case: Case, config: Path) -> list[str]:
    """`config` is where the case's model is described."""
    given = {
        "model": config, "data-path": "corpus", "train-iters": 3, "seq-length": SEQ_LENGTH,
        "tensor-model-parallel-size": case.tp, "pipeline-model-parallel-size": case.pp,
        "context-parallel-size": case.cp, "cp-comm-type": case.communication.cp_comm_type,
        "expert-model-parallel-size": case.ep, "expert-tensor-parallel-size": case.etp,
        "moe-token-dispatcher-type": case.communication.moe_token_dispatcher_type,
        "micro-batch-size": case.micro_batch_size,
        "global-batch-size": case.global_batch_size, "exp-avg-dtype": case.moments, "exp-avg-sq-dtype": case.moments,
        "cpu-offloading-num-layers": case.offload_layers,
        "data-parallel-sharding-strategy": "optim_grads_params" if case.reshard else "optim_grads",
    }
    if case.dispatcher == "grouped":
        given["moe-ranks-per-node"] = case.node
    if case.chunk:
        given["loss-chunk-size"] = case.chunk
    if case.capacity != "none":
        given["moe-expert-capacity-factor"] = case.loss.moe_expert_capacity_factor
        given["moe-token-drop-policy"] = case.capacity
    if case.pp > 1:
        given["pipeline-schedule"] = case.schedule
        stages = case.layout_string
        given |= {"pipeline-model-parallel-layout": stages} if stages else \
            {"num-virtual-stages-per-pipeline-rank": case.virtual}
    if case.recomputation.granularity:
        given["recompute-granularity"] = case.recomputation.granularity
    words = [word for option, value in given.items() for word in (f"--{option}", str(value))]
    if case.frozen_names:
        words += ["--freeze-parameters", *case.frozen_names]
    if case.adapters is not None:
        words += ["--load", "base", "--lora-rank", str(case.adapters.lora_rank), "--lora-alpha",
                  str(case.adapters.lora_alpha), "--lora-rs", "--lora-dropout",
                  str(case.adapters.lora_dropout), "--lora-target", *case.adapters.lora_target]
    if case.recomputation.modules:
        words += ["--recompute-modules", *case.recomputation.modules]
    switches = {"sequence-parallel": case.sp, "reset-attention-mask": case.packed,
                "moe-router-force-load-balancing": case.forced, "moe-shared-expert-overlap": case.overlap,
                "overlap-moe-expert-parallel-comm": case.turns, "optimizer-cpu-offload": case.offload_optimizer}
    return words + [f"--{option}" for option, on in switches.items() if on]


@cache
def settings_of(case: Case, *more: str) -> Settings:
    """What the command line of `case`, with `more` arguments, is understood as."""
    with TemporaryDirectory() as directory:
        config = Path(directory) / "config.json"
        config.write_text(json.dumps(case.model.to_hf_dict()))
        return parse([*arguments_of(case, config), *more], case.layout.world_size)


@cache
def features_of(case: Case, *more: str) -> frozenset[str]:
    settings = settings_of(case, *more)
    return frozenset(feature.name for feature in FEATURES if feature.used(settings))


def cover_features(cases: Iterable[Case], cost: Callable[[Case], float]) -> list[Case]:
    """Some of `cases` that together use every feature that any of them does, greedily by new ones for the cost."""
    cases = list(cases)
    missing, chosen = set().union(*map(features_of, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(missing & features_of(case)) / cost(case)))
        missing -= features_of(chosen[-1])
    return chosen
