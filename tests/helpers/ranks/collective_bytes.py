"""What a step's collectives send, by purpose, beside the least: counted on gloo ranks, and by formulas of a case.

`python tests/helpers/ranks/collective_bytes.py` prints the table of docs/benchmarks.md.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import SEQ_LENGTH, Case
from job import batch, make_batch, own_rows, spec_of

from megatron_deepseek.parallel.expert import AllToAllDispatcher
from megatron_deepseek.parallel.expert_grouped import GroupedDispatcher
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.parallel.nodes import places_per_node
from megatron_deepseek.parallel.recorded_collectives import Collective, RecordedCollectives
from megatron_deepseek.parallel.schedule_rules import stages_of_rank
from megatron_deepseek.planning.held_parameters import held_parameters
from megatron_deepseek.training.trainer import Trainer

E, INDEX = 8, 8  # bytes of a float64, in which layouts are compared, and of an int64
GATHERED, REDUCED, REPLICATED = "weights gathered", "gradients reduced", "gradients of replicated weights"
REGIONS, VOCABULARY, RING, TOKENS, COUNTS = ("tensor-parallel regions", "loss over the vocabulary", "ring of latents",
                                             "tokens to experts and back", "counts of tokens")
STAGES, COPIES, SEQUENCES, NUMBERS = "between stages", "copies of the embedding", "balance loss", "norm and losses"
WHOLE = "whole sequences and tokens"  # of the all-gather forms of context and expert parallelism


def purpose(call: Collective) -> str:
    """Return what a collective is for, by its kind, its group and the file that began it.

    A group of all ranks of the job is the job's own, whichever axis of the mesh it stands for.
    """
    file = call.place.partition(":")[0]
    if call.kind == "all_to_all":
        return COUNTS if call.dtype == torch.int64 else TOKENS
    if file == "parallel/vocabulary.py":
        return VOCABULARY
    if file == "parallel/collectives.py":
        return REGIONS if call.group == "mesh_tp" else WHOLE
    if call.kind in ("all_gather", "reduce_scatter"):
        return GATHERED if call.kind == "all_gather" else REDUCED
    of_group = {"mesh_tp": REPLICATED, "mesh_cp": RING, "mesh_pp": STAGES, "shared_parameters": COPIES,
                "mesh_cp_tp": SEQUENCES}
    return of_group.get(call.group, NUMBERS)


@dataclass(frozen=True)
class TokenBytes:
    """What is sent on all ranks for one rank's tokens, there and back, forwards and backwards.

    `whole`: by the dispatchers, a token with all of its weights once to each other node that has an expert of it, and
    inside a node a copy for each expert that is on another rank. `least`: inside a node a token once for each other
    rank, and with it to other nodes the weights of the experts there alone. All-to-all takes all ranks for one node.
    `choices`: the chosen experts, that travel to other nodes beside tokens, as int64 and forwards alone.
    """

    whole: int = 0
    least: int = 0
    choices: int = 0

    def __add__(self, other: "TokenBytes") -> "TokenBytes":
        return TokenBytes(self.whole + other.whole, self.least + other.least, self.choices + other.choices)


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sent in a step, by purpose. `tokens`: what its tokens take by formula, on all ranks."""

    by_purpose: dict[str, int]
    tokens: TokenBytes
    pp_rank: int


def sent_in_a_step(case: Case) -> Sent:
    """Return what this rank sent in its second step."""
    meshes = build_meshes(case.layout, torch.device("cpu"))
    trainer, reached = Trainer(spec_of(case), meshes), []
    own = own_rows(make_batch(*batch(case.model, case.global_batch_size, 0)), meshes)
    trainer.train_step(own, learning_rate=1e-3, bias_rate=1e-3)
    kind = GroupedDispatcher if case.dispatcher == "grouped" else AllToAllDispatcher
    route = kind.route

    def routed(dispatcher, experts_TK):
        reached.append(token_bytes(experts_TK, case, meshes))
        return route(dispatcher, experts_TK)

    kind.route = routed  # of this process, which ends with the job
    with RecordedCollectives() as record:
        trainer.train_step(own, learning_rate=1e-3, bias_rate=1e-3)
    by_purpose = Counter()
    for call in record.calls:
        by_purpose[purpose(call)] += call.sent
    return Sent(dict(by_purpose), sum(reached, TokenBytes()), meshes.rank("pp"))


def token_bytes(experts_TK: torch.Tensor, case: Case, meshes: Meshes) -> TokenBytes:
    """Return what the tokens of a rank that chose `experts_TK` take."""
    places = places_per_node(case.layout, case.node) if case.dispatcher == "grouped" else case.ep
    own_node, own_place = divmod(meshes.rank("ep"), places)
    of_rank_TK = experts_TK // (case.model.n_routed_experts // case.ep)
    elsewhere_TK, other_place_TK = of_rank_TK // places != own_node, of_rank_TK % places != own_place
    nodes = _different(of_rank_TK // places, elsewhere_TK)
    row, weight = 4 * case.model.hidden_size * E, 2 * E
    choices = experts_TK.shape[1]
    return TokenBytes(row * (nodes + int(other_place_TK.sum())) + weight * choices * nodes,
                      row * (nodes + _different(of_rank_TK, other_place_TK)) + weight * int(elsewhere_TK.sum()),
                      INDEX * choices * nodes)


def _different(numbers_TK: torch.Tensor, counted_TK: torch.Tensor) -> int:
    """Return how many different ones of the counted numbers the tokens have, summed over tokens."""
    return sum(len(numbers_K[counted_K].unique()) for numbers_K, counted_K in zip(numbers_TK, counted_TK))


def least_of_weights(case: Case, pp_rank: int) -> float:
    """Return what a rank sends so that each weight is gathered once, which is as much as for gradients reduced once."""
    layout = case.layout
    stages = [case.stages[index] for index in stages_of_rank(pp_rank, case.num_stages, layout.pp, case.schedule)]
    held, data = held_parameters(case.model, layout, stages), layout.dp * layout.cp
    return E * (held.dense / data * (data - 1) + held.experts / layout.edp * (layout.edp - 1))


def least(case: Case, pp_rank: int) -> dict[str, float]:
    """Return the least bytes that a rank sends, for the purposes that depend on shapes alone.

    It is for cases with latent attention, with sequence parallelism or tp 1, whose weights are gathered once a step and
    whose layers run once, without MTP modules. Stages that follow each other are on different ranks.
    """
    model, layout = case.model, case.layout
    n, micro, shards = layout.tp, case.microbatches, least_of_weights(case, pp_rank)
    tokens = case.micro_batch_size * SEQ_LENGTH // layout.cp
    held_here = stages_of_rank(pp_rank, case.num_stages, layout.pp, case.schedule)
    stages = [case.stages[index] for index in held_here]
    layers = sum(len(stage.layers) for stage in stages)
    first, last = 0 in held_here, case.num_stages - 1 in held_here
    latent = (model.q_lora_rank or model.hidden_size) + model.kv_lora_rank + model.qk_rope_head_dim
    # Entering gathers, leaving scatters; the backward does both the other way. An MLP or shared experts, if any.
    blocks = sum(not model.is_moe_layer(index) or bool(model.n_shared_experts)
                 for stage in stages for index in stage.layers)
    widths = layers * (latent + model.hidden_size) + blocks * 2 * model.hidden_size \
        + (first + last) * model.hidden_size
    ring = layers * (layout.cp - 1) * 2 * tokens * (model.kv_lora_rank + model.qk_rope_head_dim) * E
    hops = 2 * len(stages) - first - last if layout.pp > 1 else 0
    return {GATHERED: shards, REDUCED: shards,
            REGIONS: micro * 2 * tokens // n * widths * E * (n - 1),
            VOCABULARY: micro * last * 2 * 3 * tokens * E * (n - 1) / n,
            RING: micro * ring if n == 1 else 0, STAGES: micro * hops * tokens // n * model.hidden_size * E}


def replicated_bytes(case: Case) -> tuple[float, float]:
    """Return what a rank of tp sends for gradients of weights that all of them hold: reduced as they are, before data
    ranks divide them, and the least, an all-reduce of what is left to each data rank.
    """
    model, n = case.model, case.tp
    layers, hidden = model.num_hidden_layers, model.hidden_size
    moe = sum(model.is_moe_layer(index) for index in range(layers))
    of_layer = (2 * hidden + (model.q_lora_rank or 0) * (hidden + 1) + model.kv_lora_rank
                + (model.kv_lora_rank + model.qk_rope_head_dim) * hidden)
    number = layers * of_layer + moe * model.n_routed_experts * hidden + hidden
    whole = 2 * number * E * (n - 1) / n
    return whole, whole / (case.dp * case.cp)


SHOWN = (Case(dp=2, tp=2, sp=True, ep=4, microbatches=2, shared=2), Case(dp=2, cp=2, ep=2, microbatches=2),
         Case(pp=2, schedule="1F1B", dp=2, microbatches=4), Case(dp=4, ep=4, dispatcher="grouped", node=2))


def of_all_ranks(case: Case, sent: list[Sent]) -> dict[str, tuple[int, float | None]]:
    """Return what all ranks of a case sent, and the least where there is a formula, by purpose."""
    counted, needed = Counter(), Counter()
    for each in sent:
        counted.update(each.by_purpose)
        needed.update(least(case, each.pp_rank))
        needed[TOKENS] += each.tokens.least
        needed[REPLICATED] += replicated_bytes(case)[1]
    return {name: (number, needed.get(name) or None) for name, number in counted.items() if number}


def table(ranks) -> Iterator[str]:
    """Yield the lines of the table, counted on `ranks` (ranks.Ranks)."""
    yield "| layout | purpose | bytes sent | least | times |"
    yield "|---|---|---|---|---|"
    for case in SHOWN:
        found = of_all_ranks(case, ranks.run(case.layout.world_size, sent_in_a_step, case))
        for name, (number, size) in sorted(found.items(), key=lambda each: -each[1][0]):
            yield (f"| {case} | {name} | {number:,} | {f'{size:,.0f}' if size else ''} "
                   f"| {f'{number / size:.2f}' if size else ''} |")


def main() -> None:
    from ranks import Ranks

    for line in table(Ranks()):
        print(line, flush=True)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    main()
