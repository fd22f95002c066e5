"""The features that a run can switch on, and which two of them go together: the one table of what goes with what.

A feature is one entry of FEATURES. Two features are alternatives if they are of one kind, refused if a validation
rule says so (`excludes`), and otherwise tested together: tests/parallel/test_compatibility.py asks each tested case
which features it uses, and fails for a pair that no case has.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from string import ascii_letters

from megatron_deepseek.arguments.model_options import DROP_POLICIES
from megatron_deepseek.arguments.parser import RECOMPUTE_MODULES
from megatron_deepseek.arguments.validation import OVERLAPPED_DISPATCH, RULES
from megatron_deepseek.parallel.schedule_rules import VIRTUAL_STAGES
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.settings import Settings

TESTED, ALTERNATIVE = ".", "/"


@dataclass(frozen=True)
class Feature:
    """Something that a run can switch on.

    `used` tells whether a run has it; `arguments` switch it on for the model `tiny` on 8 ranks.

    Features of one `kind` exclude each other, since one argument takes one value.
    """

    name: str
    arguments: str
    used: Callable[[Settings], bool]
    kind: str | None = None


def _schedule(name: str) -> Feature:
    layers = "" if VIRTUAL_STAGES[name] == 1 else " --num-virtual-stages-per-pipeline-rank 2"
    return Feature(name, f"--pipeline-model-parallel-size 2 --pipeline-schedule {name}{layers}",
                   lambda s: s.layout.pp > 1 and s.pipeline.schedule == name, "schedule")


def _placement(name: str, layout: str, where: str) -> Feature:
    return Feature(name, f"--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout {layout}",
                   lambda s: mtp_placement(s) == where, "placement")


def mtp_placement(s: Settings) -> str | None:
    """Return where a pipeline has its MTP modules: "split" over stages, on the "last" one, or on its "own" before it.

    None without a pipeline or without MTP modules.
    """
    if s.layout.pp == 1 or not s.model.num_nextn_predict_layers:
        return None
    stages = resolve(s.model, s.pipeline, s.layout.pp, s.data.seq_length)
    holding = [index for index, stage in enumerate(stages) if stage.mtp]
    if len(holding) > 1:
        return "split"
    return "last" if holding[0] == len(stages) - 1 else "own"


def _context(exchange: str) -> Feature:
    return Feature(f"context parallel, {exchange}", f"--context-parallel-size 2 --cp-comm-type {exchange}",
                   lambda s: s.layout.cp > 1 and s.communication.cp_comm_type == exchange, "exchange")


def _dispatcher(name: str) -> Feature:
    nodes = " --moe-ranks-per-node 2" if name == "grouped" else ""
    return Feature(f"expert parallel, {name}",
                   f"--expert-model-parallel-size 4 --moe-token-dispatcher-type {name}{nodes}",
                   lambda s: s.layout.ep > 1 and s.communication.moe_token_dispatcher_type == name, "dispatcher")


def _capacity(policy: str) -> Feature:
    return Feature(f"capacity, {policy}", f"--moe-expert-capacity-factor 1.5 --moe-token-drop-policy {policy}",
                   lambda s: s.loss.moe_expert_capacity_factor is not None and s.loss.moe_token_drop_policy == policy,
                   "capacity")


def _router(name: str, arguments: str, method: str) -> Feature:
    return Feature(name, arguments, lambda s: bool(s.model.n_routed_experts) and s.model.topk_method == method,
                   "router")


def _recomputed(module: str) -> Feature:
    return Feature(f"recompute {module}", f"--recompute-granularity selective --recompute-modules {module}",
                   lambda s: s.recompute.granularity == "selective" and module in s.recompute.modules)


FEATURES = (
    Feature("data parallel", "", lambda s: s.layout.dp > 1),
    Feature("sharded weights", "--data-parallel-sharding-strategy optim_grads_params",
            lambda s: s.run.sharding == "optim_grads_params"),
    Feature("tensor parallel", "--tensor-model-parallel-size 2", lambda s: s.layout.tp > 1),
    Feature("sequence parallel", "--tensor-model-parallel-size 2 --sequence-parallel",
            lambda s: s.layout.sequence_parallel),
    _context("ring"), _context("allgather"),
    _dispatcher("alltoall"), _dispatcher("allgather"), _dispatcher("grouped"),
    Feature("expert tensor parallel", "--expert-tensor-parallel-size 2", lambda s: s.layout.etp > 1),
    *(_schedule(name) for name in VIRTUAL_STAGES),
    Feature(OVERLAPPED_DISPATCH,
            "--pipeline-model-parallel-size 2 --pipeline-schedule DualPipeV --expert-model-parallel-size 2 "
            "--overlap-moe-expert-parallel-comm", lambda s: s.communication.overlap_moe_expert_parallel_comm),
    Feature("several micro-batches", "--global-batch-size 64",
            lambda s: s.batch.global_batch_size > s.batch.micro_batch_size * s.layout.dp),
    Feature("several rows in a micro-batch", "--micro-batch-size 2", lambda s: s.batch.micro_batch_size > 1),
    Feature("packed documents", "--reset-attention-mask", lambda s: s.data.reset_attention_mask),
    Feature("no experts", "--num-experts 0", lambda s: not s.model.n_routed_experts, "router"),
    _router("router greedy", "--model deepseek-v2-lite", "greedy"),
    _router("router group-limited", "--model deepseek-v2", "group_limited_greedy"),
    _router("router noaux_tc", "--model tiny", "noaux_tc"),
    Feature("forced balance", "--moe-router-force-load-balancing",
            lambda s: s.loss.moe_router_force_load_balancing),
    *(_capacity(policy) for policy in DROP_POLICIES),
    Feature("shared experts", "--moe-shared-expert-intermediate-size 128",
            lambda s: bool(s.model.n_routed_experts and s.model.n_shared_experts)),
    Feature("shared experts overlapped", "--moe-shared-expert-overlap",
            lambda s: s.communication.moe_shared_expert_overlap),
    Feature("MTP", "--mtp-num-layers 1", lambda s: s.model.num_nextn_predict_layers > 0),
    Feature("MTP, several depths", "--mtp-num-layers 2", lambda s: s.model.num_nextn_predict_layers > 1),
    _placement("MTP on the last stage", "Ett|t|t|mL", "last"),
    _placement("MTP before the last stage", "Ettt|t|m|L", "own"),
    _placement("MTP on several stages", "Ettt|t|m|mL --mtp-num-layers 2", "split"),
    Feature("no query compression", "--q-lora-rank 0",
            lambda s: s.model.q_lora_rank is None and not s.model.grouped_query, "attention"),
    Feature("grouped-query attention", "--model deepseek-v2-lite --group-query-attention --num-query-groups 2",
            lambda s: s.model.grouped_query, "attention"),
    Feature("tied embeddings", "--tie-word-embeddings", lambda s: s.model.tie_word_embeddings),
    Feature("loss by chunks", "--loss-chunk-size 64", lambda s: s.loss.loss_chunk_size is not None),
    Feature("recompute layers", "--recompute-granularity full", lambda s: s.recompute.granularity == "full"),
    *(_recomputed(module) for module in RECOMPUTE_MODULES),
    Feature("activations offloaded", "--cpu-offloading-num-layers 1",
            lambda s: s.offload.cpu_offloading_num_layers > 0),
    Feature("optimizer offloaded", "--optimizer-cpu-offload", lambda s: s.offload.optimizer_cpu_offload),
    Feature("bf16", "--bf16", lambda s: s.run.bf16),
    Feature("fp8", "--fp8-format e4m3 --fp8-recipe blockwise", lambda s: s.run.fp8_format is not None),
    Feature("fp8 weights gathered", "--fp8-format e4m3 --fp8-param-gather", lambda s: s.run.fp8_param_gather),
    Feature("compiled layers", "--compile", lambda s: s.run.compile),
    Feature("bf16 moments", "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
            lambda s: "bf16" in (s.optimizer.exp_avg_dtype, s.optimizer.exp_avg_sq_dtype)),
    Feature("frozen parameters", "--freeze-parameters model.embed_tokens.weight",
            lambda s: bool(s.run.freeze_parameters)),
    Feature("LoRA", "--lora-rank 4 --load base", lambda s: s.lora is not None),
    Feature("LoRA dropout", "--lora-rank 4 --lora-dropout 0.1 --load base",
            lambda s: s.lora is not None and s.lora.lora_dropout > 0),
)


def cell(one: Feature, other: Feature) -> str | int:
    """Return TESTED, ALTERNATIVE, or the number of the validation rule that refuses the pair, counted from 1."""
    if one.kind is not None and one.kind == other.kind:
        return ALTERNATIVE
    for number, rule in enumerate(RULES, 1):
        if any({one.name, other.name} == set(pair) for pair in rule.excludes):
            return number
    return TESTED


def table(marked: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the lines of the triangle of all pairs; features whose names are `marked` have a star."""
    width = max(len(feature.name) for feature in FEATURES)
    numbers = range(1, len(FEATURES) + 1)
    letters: dict[int, str] = {}
    yield " " * (width + 6) + "".join(f"{n // 10 or ' '} " for n in numbers).rstrip()
    yield " " * (width + 6) + "".join(f"{n % 10} " for n in numbers).rstrip()
    for number, row in zip(numbers, FEATURES):
        cells = [cell(row, column) for column in FEATURES[:number - 1]]
        shown = [c if isinstance(c, str) else letters.setdefault(c, ascii_letters[len(letters)])
                 for c in cells]
        yield f"{number:3} {row.name:{width}} {'*' if row.name in marked else ' '}{' '.join(shown)}".rstrip()
    yield f"  {TESTED} compared with one process in a test   {ALTERNATIVE} one or the other"
    for reason, letter in letters.items():
        yield f"  {letter} refused, reason {reason}: {RULES[reason - 1].name}"
