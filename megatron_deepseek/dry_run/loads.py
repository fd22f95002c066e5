"""The tokens of every layer's experts in a dry run of given settings: drawn, and given to the layers' dispatchers."""

from collections.abc import Callable

from megatron_deepseek.dry_run.routing import DrawnRoutes, Loads, shares
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.parallel.expert import Dispatcher
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.node_reach import expected_nodes
from megatron_deepseek.settings import Settings

Wrap = Callable[[Dispatcher, int, Meshes], Dispatcher]  # the dispatcher of a layer, by its index, on a rank


def drawn(settings: Settings, distribution: str) -> Wrap:
    """Return what gives a layer's dispatcher counts that are drawn from `distribution`."""
    model, communication, even = settings.model, settings.communication, settings.loss.moe_router_force_load_balancing
    node = communication.moe_ranks_per_node or settings.layout.world_size

    def wrap(dispatcher: Dispatcher, index: int, meshes: Meshes) -> DrawnRoutes:
        return DrawnRoutes(dispatcher, Loads(
            shares(distribution, model.n_routed_experts, seed=index),
            expected_nodes(model, settings.layout, node, even), unrouted_tokens(settings, index, meshes),
            settings.loss.moe_expert_capacity_factor, settings.layout.etp))

    return wrap


def unrouted_tokens(settings: Settings, index: int, meshes: Meshes) -> int:
    """Return how many tokens of this rank's micro-batch have no next embedding in the MTP module that is layer `index`:
    the last ones of each sequence.
    """
    depth = index - settings.model.num_hidden_layers + 1
    if depth < 1:
        return 0
    layout, length = settings.layout, settings.data.seq_length
    own = length // layout.cp // layout.tp
    last = length // layout.cp - meshes.rank("tp") * own  # of this context rank's tokens, behind this rank's first
    half = length // (2 * layout.cp)
    if meshes.rank("cp") > 0 and depth <= half * meshes.rank("cp"):
        return 0  # the first context rank has the last chunk (zigzag)
    return settings.batch.micro_batch_size * max(0, min(own, depth - (last - own)))


def with_dispatchers(stages: list[DeepseekStage], wrap: Wrap, meshes: Meshes) -> list[DeepseekStage]:
    """Return the stages with each layer's dispatcher in what `wrap` makes of it."""
    for index, layer in ((int(index), layer) for stage in stages for index, layer in stage.model.layers.items()):
        if layer.is_moe:
            layer.mlp.dispatcher = wrap(layer.mlp.dispatcher, index, meshes)
    return stages


def fullest_rank(settings: Settings, pp_rank: int, distribution: str) -> int:
    """Return the rank of a pipeline rank whose experts get the most tokens of all its layers together."""
    job, layout = Job(settings), settings.layout
    loads = [0.0] * layout.ep
    each = settings.model.n_routed_experts // layout.ep
    for index in (index for stage in job.held(pp_rank) for index in job.layers_of(stage)):
        if settings.model.is_moe_layer(index):
            parts = shares(distribution, settings.model.n_routed_experts, seed=index)
            loads = [load + sum(parts[place * each:(place + 1) * each]) for place, load in enumerate(loads)]
    first = pp_rank * layout.world_size // layout.pp
    return first + layout.etp * max(range(layout.ep), key=lambda place: round(loads[place], 9))
