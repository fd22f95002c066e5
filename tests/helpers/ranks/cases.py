"""Which layouts and mixes of features are tested: their options, what goes with what, and what each stands for.

The cases of the covering array are stored in covering_cases.json, because drawing them takes 16 s.
`python tests/helpers/ranks/cases.py` draws them again, for other options or constraints.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

from covering import Space, cheaper_array, covering_array
from cuts import random_cut
from subsets import all_but, drawn

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel import schedule_rules
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.settings import (
    CommunicationSettings,
    LoraSettings,
    LossSettings,
    OffloadSettings,
    PipelineSettings,
    RecomputeSettings,
)

SEQ_LENGTH = 8
NUM_EXPERTS = 8

# The options that a covering array is made of. Layout first: the search for valid cases assigns them in this order.
# An option that means nothing without another has a value "none" for that: pairs with its other values are then pairs
# with what they do.
OPTIONS = {
    "pp": (1, 2, 4),
    "schedule": ("none", *schedule_rules.SCHEDULES),
    "virtual": (1, 2),
    "tp": (1, 2),
    "dp": (1, 2),
    "cp": (1, 2),
    "cp_type": ("none", "ring", "allgather"),
    "sp": (False, True),
    "router": ("dense", "greedy", "group_limited", "noaux_tc"),
    "ep": (1, 2, 4),
    "etp": (1, 2),
    "dispatcher": ("none", "alltoall", "allgather", "grouped"),
    "node": (1, 2),
    "forced": (False, True),
    "microbatches": (1, 3, 5, 8),
    "micro_batch_size": (1, 2),
    "packed": (False, True),
    "padded": (False, True),
    "capacity": ("none", "probs", "position"),
    "mtp": (0, 1, 2),
    "placement": ("balanced", "last", "own", "split"),
    "shared": (0, 2),
    "overlap": (False, True),
    "turns": (False, True),
    "attention": ("latent", "no_q_lora", "grouped", "one_key_head"),
    "attention_bias": (False, True),
    "tied": (False, True),
    "chunk": (0, 3),
    "recompute": ("none", "full", "layernorm", "mla_up_proj", "moe_act"),
    "reshard": (False, True),
    "moments": ("fp32", "bf16"),
    "offload_layers": (0, 1),
    "offload_optimizer": (False, True),
    "objective": ("next_token", "samples", "pairs", "distillation"),
    "frozen": (0, 1),
    "lora": ("none", "attention+mlp", "all+router+mtp"),
}

CONSTRAINTS = (
    lambda dp, cp, tp, pp: dp * cp * tp * pp <= 8,
    lambda cp, cp_type: (cp == 1) == (cp_type == "none"),
    lambda cp, tp: SEQ_LENGTH % (2 * cp) == 0 and SEQ_LENGTH % (cp * tp) == 0,
    lambda sp, tp: tp > 1 or not sp,
    lambda ep, etp, dp, cp, tp: dp * cp * tp % (ep * etp) == 0,
    lambda ep, dispatcher: ep == 1 or dispatcher != "none",
    lambda dispatcher, ep, etp, node: node == 1 if dispatcher != "grouped" else
    node % (ep * etp) == 0 or ep * etp % node == 0 and node % etp == 0,
    lambda router, ep, etp: router != "dense" or ep * etp == 1,
    lambda attention, router: attention in ("latent", "no_q_lora") or router in ("dense", "greedy"),
    lambda router, forced: router != "dense" or not forced,
    lambda router, capacity: router != "dense" or capacity == "none",
    lambda shared, overlap: shared > 0 or not overlap,
    lambda turns, schedule, dispatcher: not turns or schedule == "DualPipeV" and dispatcher in ("alltoall", "grouped"),
    lambda turns, ep: not turns or ep > 1,
    lambda router, dispatcher: router != "dense" or dispatcher == "none",
    lambda router, shared: router != "dense" or shared == 0,
    lambda router, recompute: router != "dense" or recompute != "moe_act",
    lambda pp, schedule: (pp == 1) == (schedule == "none"),
    lambda schedule, virtual: virtual == 1 if schedule == "none" else
    schedule_rules.takes_virtual_stages(schedule, virtual),
    lambda schedule, pp, microbatches: schedule == "none" or
    schedule_rules.takes_microbatches(schedule, pp, microbatches),
    lambda mtp, placement: placement == "balanced" or mtp > 0,
    lambda mtp, placement: placement != "split" or mtp > 1,
    lambda pp, placement: placement == "balanced" or pp > 1,
    lambda pp, virtual, placement: placement != "own" or pp * virtual > 2,
    lambda objective, micro_batch_size: objective != "pairs" or micro_batch_size % 2 == 0,
    lambda lora, frozen: lora == "none" or frozen == 0,
    lambda lora, router, mtp: lora != "all+router+mtp" or router != "dense" and mtp > 0,
)

# Not rules of the project: what keeps a case cheap. DualPipeV over 4 ranks needs 8 micro-batches.
SMALL = (
    lambda pp, virtual: pp * virtual <= 8,
    lambda dp, microbatches, micro_batch_size: dp * microbatches * micro_batch_size <= 16,
)
SMALLER = SMALL + (
    lambda schedule, pp, microbatches: microbatches < 8 or (schedule == "DualPipeV" and pp == 4),
    lambda ep, dispatcher: ep > 1 or dispatcher == "none",
)


@dataclass(frozen=True)
class Case:
    """One value of every option; the properties say what they stand for."""

    pp: int = 1
    schedule: str = "none"
    virtual: int = 1
    tp: int = 1
    dp: int = 1
    cp: int = 1
    cp_type: str = "ring"
    sp: bool = False
    router: str = "noaux_tc"
    ep: int = 1
    etp: int = 1
    dispatcher: str = "alltoall"
    node: int = 1
    forced: bool = False
    microbatches: int = 1
    micro_batch_size: int = 1
    packed: bool = False
    padded: bool = False
    capacity: str = "none"
    mtp: int = 0
    placement: str = "balanced"
    shared: int = 0
    overlap: bool = False
    turns: bool = False
    attention: str = "latent"
    attention_bias: bool = False
    tied: bool = False
    chunk: int = 0
    recompute: str = "none"
    reshard: bool = False
    moments: str = "fp32"
    offload_layers: int = 0
    offload_optimizer: bool = False
    objective: str = "next_token"
    frozen: int = 0
    lora: str = "none"
    trained: str = ""
    cut: int = 0
    first: int = 0
    replay: bool = False
    compiler: str | None = None  # the backend of torch.compile that layers are compiled with

    def __str__(self) -> str:
        """The options that differ from one plain process, as arguments for exhaustive.py."""
        given = asdict(self)
        return " ".join(f"{f.name}={given[f.name]}" for f in fields(self) if given[f.name] != f.default) or "plain"

    @property
    def layout(self) -> Layout:
        return Layout(dp=self.dp, pp=self.pp, tp=self.tp, cp=self.cp, ep=self.ep, etp=self.etp,
                      sequence_parallel=self.sp)

    @property
    def global_batch_size(self) -> int:
        return self.dp * self.microbatches * self.micro_batch_size

    @property
    def first_batch_size(self) -> int:
        """Of the first step, as under a ramp; the same as later unless `first` says how many micro-batches it has."""
        return self.dp * (self.first or self.microbatches) * self.micro_batch_size

    @property
    def num_stages(self) -> int:
        return self.pp * self.virtual

    @property
    def num_layers(self) -> int:
        """As many as a drawn cut has, else at least one for each stage that `placement` leaves to layers."""
        if self.cut:
            return self.layout_string.count("t")
        return max(2, self.num_stages - {"balanced": 0, "last": 1, "own": 2, "split": 1}[self.placement])

    @property
    def layout_string(self) -> str | None:
        """Drawn, or MTP modules on the last stage, on a stage of their own before it, or on the last two."""
        if self.cut:
            return random_cut(self.cut, self.num_stages, self.mtp)
        end = {"balanced": "", "last": "|" + "m" * self.mtp + "L", "own": "|" + "m" * self.mtp + "|L",
               "split": "m" * (self.mtp - 1) + "|mL"}[self.placement]
        if not end:
            return None
        num_holders = self.num_stages - end.count("|")
        share, more = divmod(self.num_layers, num_holders)
        return "E" + "|".join("t" * (share + (i < more)) for i in range(num_holders)) + end

    @property
    def stages(self) -> tuple[Stage, ...]:
        pipeline = PipelineSettings(self.schedule, self.layout_string, self.virtual)
        return resolve(self.model, pipeline, self.pp, SEQ_LENGTH)

    @property
    def model(self) -> ModelConfig:
        """A DeepSeek small enough that a step is mostly overhead, with a dense layer before the MoE layers."""
        return ModelConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=self.num_layers,
            num_attention_heads=4, initializer_range=0.2,
            num_nextn_predict_layers=self.mtp, tie_word_embeddings=self.tied, attention_bias=self.attention_bias,
            **self.attention_fields, **ROUTERS[self.router], n_shared_experts=self.shared)

    @property
    def attention_fields(self) -> dict:
        """One head of keys is on every TP rank. Norms, biases and windows are Qwen's, which has no experts."""
        if self.attention in ("latent", "no_q_lora"):
            return dict(first_k_dense_replace=1, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
                        q_lora_rank=12 if self.attention == "latent" else None)
        grouped, dense = self.attention == "grouped", self.router == "dense"
        types = ("full_attention", *("sliding_attention",) * (self.num_layers - 1))
        qwen3 = dict(qk_norm=True, sliding_window=3, layer_types=types)
        qwen2 = dict(qkv_bias=not self.attention_bias)
        return dict(head_dim=4, num_key_value_heads=2 if grouped else 1, first_k_dense_replace=0 if dense else 1,
                    **(qwen3 if grouped else qwen2) if dense else {})

    @property
    def loss(self) -> LossSettings:
        """Weights of the balance losses are large, so that a mistake in them shows."""
        kind = {"dense": "none", "greedy": "aux_loss"}.get(self.router, "seq_aux_loss")
        levels = dict(moe_device_aux_loss_coeff=0.2, moe_communication_aux_loss_coeff=0.3) \
            if self.router == "group_limited" else {}
        return LossSettings(balance_type=kind, moe_aux_loss_coeff=0.1 if kind != "none" else 0.0,
                            moe_router_force_load_balancing=self.forced, loss_chunk_size=self.chunk or None,
                            **CAPACITIES[self.capacity], **levels)

    @property
    def communication(self) -> CommunicationSettings:
        """Defaults stand in for "none"."""
        given = dict(cp_comm_type=self.cp_type, moe_token_dispatcher_type=self.dispatcher)
        return CommunicationSettings(moe_ranks_per_node=self.node, moe_shared_expert_overlap=self.overlap,
                                     overlap_moe_expert_parallel_comm=self.turns,
                                     **{name: value for name, value in given.items() if value != "none"})

    @property
    def offload(self) -> OffloadSettings:
        return OffloadSettings(self.offload_layers, self.offload_optimizer)

    @property
    def recomputation(self) -> RecomputeSettings:
        if self.recompute in ("none", "full"):
            return RecomputeSettings(None if self.recompute == "none" else "full")
        return RecomputeSettings("selective", tuple(self.recompute.split(",")))

    @property
    def reference(self) -> "Reference":
        """What one process must compute to be compared with. It takes the batch as a whole where all are as large,
        except where aux_loss pools a micro-batch of several sequences: there its size is part of what is computed. All
        logits exist at once.
        """
        loss, size = replace(self.loss, loss_chunk_size=None), math.gcd(self.global_batch_size, self.first_batch_size)
        if loss.balance_type == "aux_loss" and self.micro_batch_size > 1:
            size = self.micro_batch_size
        elif loss.balance_type == "aux_loss":
            loss = replace(loss, balance_type="seq_aux_loss")
        return Reference(self.model, loss, self.global_batch_size, self.first_batch_size, size, self.packed,
                         self.padded, self.moments, self.objective, self.frozen_names, self.adapters, self.replay)

    @property
    def adapters(self) -> LoraSettings | None:
        """Rank 2 where layers have 8 inputs at the least, so that A and B have nothing in common with the weight. They
        drop much, so that a wrong mask shows.
        """
        if self.lora == "none":
            return None
        return LoraSettings(2, 3.0, tuple(self.lora.split("+")), lora_rs=True, lora_dropout=0.25)

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Drawn, or all but those that `trained` names. None of MTP modules that the objective leaves out."""
        trains_mtp = self.objective in ("next_token", "samples")
        used = self.model if trains_mtp else replace(self.model, num_nextn_predict_layers=0)
        return all_but(self.model, self.trained) if self.trained else drawn(used, self.frozen)


@dataclass(frozen=True)
class Reference:
    """A model and its data on one process, whatever the layout that is compared with it."""

    model: ModelConfig
    loss: LossSettings
    global_batch_size: int
    first_batch_size: int
    micro_batch_size: int
    packed: bool = False
    padded: bool = False
    moments: str = "fp32"
    objective: str = "next_token"
    frozen: tuple[str, ...] = ()
    lora: LoraSettings | None = None
    replay: bool = False


# Of 8 tokens that choose 2 of 8 experts: 2 a sequence at an even share, so that the favourites are above it.
CAPACITIES = {"none": {}, "probs": dict(moe_expert_capacity_factor=1.0, moe_token_drop_policy="probs"),
              "position": dict(moe_expert_capacity_factor=0.7, moe_token_drop_policy="position")}
_MOE = dict(moe_intermediate_size=8, n_routed_experts=NUM_EXPERTS, num_experts_per_tok=2)
ROUTERS = {
    "dense": {},
    "greedy": _MOE | dict(topk_method="greedy", scoring_func="softmax"),
    "group_limited": _MOE | dict(topk_method="group_limited_greedy", scoring_func="softmax", n_group=4, topk_group=2,
                                 routed_scaling_factor=4.0),
    "noaux_tc": _MOE | dict(topk_method="noaux_tc", scoring_func="sigmoid", n_group=4, topk_group=2,
                            norm_topk_prob=True, routed_scaling_factor=2.5),
}


# Once each: sizes that the array leaves out (8 expert ranks, 4 heads over 4 ranks, 2 heads of keys over 4 ranks, shards
# of 3 and of 4 data ranks, 4 context ranks, 3 stages on a rank, 8 ranks in a row), recomputed layers whose weight
# gradients wait in W steps, dispatchers that have nothing to exchange, around slices of experts, and cuts:
# E|t|tt|t|t|t|m|L and E|t|tttmm|mL, and with stages that hold nothing Et||tttmm|L and Et|t||ttmL. Then few parameters
# that are trained: whose inputs need no gradient, and that lie on stages behind frozen ones, in front of them, or on
# both ends.
WIDE_CASES = (
    Case(tp=4, dp=2, sp=True, ep=8, dispatcher="grouped", node=4, microbatches=2, mtp=1, shared=2),
    Case(cp=4, tp=2, sp=True, ep=4, microbatches=2, mtp=1, shared=2, recompute="mla_up_proj"),
    Case(tp=4, cp=2, sp=True, router="dense", attention="grouped", microbatches=2, packed=True,
         recompute="mla_up_proj"),
    Case(tp=2, router="dense", attention="one_key_head", microbatches=2, packed=True),
    Case(dp=3, tp=2, router="group_limited", ep=2, microbatches=2, mtp=1, attention_bias=True, reshard=True),
    Case(dp=4, pp=2, schedule="1F1B", ep=4, microbatches=2, micro_batch_size=2, tied=True),
    Case(pp=2, schedule="InterleavedZeroBubble", virtual=2, microbatches=4, mtp=1, recompute="full"),
    Case(pp=2, schedule="InterleavedZeroBubble", virtual=3, tp=2, ep=2, microbatches=4, mtp=2, placement="split",
         tied=True, recompute="layernorm,mla_up_proj,moe_act"),
    Case(pp=8, schedule="1F1B", router="greedy", microbatches=8, mtp=1, tied=True, cut=7),
    Case(dp=2, etp=2, dispatcher="allgather", shared=2),
    Case(tp=2, etp=2, dispatcher="grouped", node=2, capacity="probs"),
    Case(pp=2, schedule="DualPipeV", virtual=2, microbatches=4, mtp=3, offload_layers=1, cut=20, first=5),
    Case(pp=4, schedule="1F1B", tp=2, sp=True, ep=2, microbatches=4, mtp=2, moments="bf16", cut=112),
    Case(pp=2, schedule="DualPipeV", virtual=2, dp=2, ep=2, microbatches=4, mtp=1, turns=True, cut=119),
    Case(cp=2, mtp=1, recompute="full", trained="*.0.*.kv_b_proj.weight"),
    Case(pp=2, schedule="ZBVZeroBubble", virtual=2, cp=2, cp_type="allgather", router="dense", microbatches=2,
         trained="*.kv_b_proj.weight"),
    Case(pp=4, schedule="1F1B", microbatches=4, mtp=1, tied=True, reshard=True, trained="model.layers.[34]*"),
    Case(pp=2, schedule="DualPipeV", virtual=2, dp=2, ep=2, microbatches=4, mtp=1, turns=True, shared=2,
         trained="*.layers.[234].*experts*"),
    Case(pp=2, schedule="InterleavedZeroBubble", virtual=2, tp=2, sp=True, ep=2, microbatches=4, mtp=2, shared=2,
         placement="split", trained="*.gate.weight"),
    Case(pp=2, schedule="ZBVZeroBubble", virtual=2, dp=2, microbatches=2, mtp=1, tied=True, recompute="full",
         offload_layers=1, trained="model.embed_tokens.weight"),
)


def cost(case: dict) -> float:
    """Processor seconds of a case and its reference, fitted to measurements on two cores.

    Frozen ones count half as much again: others of the same model do not share their reference, and compare more.
    """
    layers = max(2, case["pp"] * case["virtual"]) + case["mtp"]
    ranks = case["tp"] * case["dp"] * case["cp"]
    steps = 0.1 * layers + 0.15 * case["pp"] * ranks + layers * ranks * (0.2 + 0.085 * case["microbatches"])
    return (0.8 + steps) * (1.5 if case["frozen"] else 1.0)


SPACE = Space(OPTIONS, CONSTRAINTS + SMALLER)
STORED = Path(__file__).with_name("covering_cases.json")


def draw_covering_cases(seed: int = 0) -> list[dict]:
    """Return cases that hold every valid pair of OPTIONS, each of less than ten seconds of two cores."""
    return cheaper_array(SPACE, covering_array(SPACE, seed, cost), seed, cost)


@cache
def covering_cases() -> tuple[Case, ...]:
    """Return the stored cases, or draw them if the options or what the constraints say have changed since."""
    stored = json.loads(STORED.read_text())
    cases = stored["cases"] if stored["space"] == SPACE.fingerprint() else draw_covering_cases()
    return tuple(Case(**case) for case in cases)


if __name__ == "__main__":
    rows = ",\n".join(json.dumps(case) for case in draw_covering_cases())
    STORED.write_text(f'{{"space": "{SPACE.fingerprint()}", "cases": [\n{rows}\n]}}\n')
