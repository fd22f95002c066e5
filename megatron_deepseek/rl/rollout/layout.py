"""Over which ranks the engine of rollouts divides the model: all ranks of the training job, in a layout of its own.

There is no pipeline and no context parallelism in it: answers come token by token, so stages would wait for each other.
Nothing here imports torch.
"""

from megatron_deepseek.model.architecture.base_weights import BaseSettings, frozen_shape, quantised_rows, refuse_cut
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.placements import EP, ETP, TP
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.rl_settings import RolloutSettings

TP_OPTION, EP_OPTION = "--rollout-tensor-parallel-size", "--rollout-expert-parallel-size"


def engine_layout(config: ModelConfig, training: Layout, rollout: RolloutSettings) -> Layout:
    """Return the engine's layout: with training's tensor and expert ranks unless others are asked for.

    Raise ValueError, of one line, for numbers of ranks that do not divide what they are to divide.
    """
    world = training.world_size
    tp, ep = rollout.tp or training.tp, rollout.ep or training.ep
    shared = config.moe_intermediate_size * config.n_shared_experts if config.n_routed_experts else tp
    for option, ranks, what, size in (
            (TP_OPTION, tp, "the number of ranks", world), (EP_OPTION, ep, "the number of ranks", world),
            (TP_OPTION, tp, "--num-attention-heads", config.num_attention_heads),
            (TP_OPTION, tp, "--ffn-hidden-size", config.intermediate_size),
            (TP_OPTION, tp, "--moe-shared-expert-intermediate-size", shared),
            (TP_OPTION, tp, "the number of rows of the embedding", config.vocab_size),
            (EP_OPTION, ep, "--num-experts", config.n_routed_experts or 1)):
        if size % ranks:
            raise ValueError(f"{option} {ranks} does not divide {what} {size}")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise ValueError(f"{TP_OPTION} {tp} neither divides --num-query-groups {config.num_kv_heads} nor is a multiple "
                         "of it")
    return Layout(dp=world // tp, tp=tp, ep=ep)


def check_base(config: ModelConfig, base: BaseSettings, training: Layout, engine: Layout) -> None:
    """Raise ValueError if the bytes of frozen weights are not divided alike by both layouts: they are sent as they are.
    """
    ranks = [{TP: each.tp, EP: each.ep, ETP: each.etp} for each in (training, engine)]
    for row in quantised_rows(config):
        refuse_cut(row, base, ranks[1])
        here, there = (frozen_shape(row, base, each) for each in ranks)
        if (here.codes, here.scales) != (there.codes, there.scales):
            raise ValueError(f"{TP_OPTION} {engine.tp}: with --quantization-bit {base.quantization_bit} the scales of "
                             f"{row.name} are of other rows than with training's {training.tp} tensor-parallel ranks")
