"""The command-line options of the model: its architecture, its experts and their losses, the context's extension.

Every architecture argument defaults to None and is stored under the field of ModelConfig that it overrides, so that
only what was given overrides the preset.
"""

import argparse

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.help_models import HelpModels
from megatron_deepseek.model.architecture.fields import RULES
from megatron_deepseek.model.architecture.rope_scaling import ROPE_KINDS

DROP_POLICIES = ("probs", "position")

# (option, field of ModelConfig, type, help): each stands at its field.
ARCHITECTURE = tuple((rule.option.name, field, getattr(values, rule.option.kind), rule.option.help)
                     for field, rule in RULES.items() if rule.option is not None)
# (option, field of RopeScaling, type, help)
ROPE_SCALING = (
    ("--rotary-scaling-factor", "factor", values.positive, "context extension factor; 1 turns scaling off"),
    ("--original-max-position-embeddings", "original_max_position_embeddings", values.positive_int,
     "context length before extension, in tokens"),
    ("--beta-fast", "beta_fast", values.positive, "YaRN: rotations above which a frequency is kept"),
    ("--beta-slow", "beta_slow", values.positive, "YaRN: rotations below which a frequency is interpolated"),
    ("--mscale", "mscale", values.non_negative, "YaRN: weight of the logarithm in the scale of the rotary part"),
    ("--mscale-all-dim", "mscale_all_dim", values.non_negative, "YaRN: the same for all dimensions (softmax scale)"),
)


def add_model(parser):
    group = parser.add_argument_group("model", "explicit arguments override the preset or file")
    group.add_argument("--model", type=str, metavar="NAME|PATH",
                       help="a released model (--help-models lists them), or a Hugging Face config.json; not needed "
                       "where the arguments give the whole architecture, as Megatron-LM's do")
    group.add_argument("--help-models", action=HelpModels, help="list the released models with their sizes, and leave")
    group.add_argument("--yaml-cfg", type=str, metavar="FILE",
                       help="more arguments, under MODEL_ARGS of a YAML file; @FILE has them as on a command line")
    for option, field, kind, text in ARCHITECTURE:
        group.add_argument(option, dest=field, type=kind, help=text)
    group.add_argument("--group-query-attention", action="store_true",
                       help="grouped-query attention (--num-query-groups, --kv-channels) in place of latent attention")
    group.add_argument("--add-qkv-bias", action="store_true",
                       help="biases of queries, keys and values in grouped-query attention, as Qwen2's")
    _add_vocabulary(group.add_argument)
    tie = group.add_mutually_exclusive_group()
    tie.add_argument("--untie-embeddings-and-output-weights", action="store_true", help="own weights for the head")
    tie.add_argument("--tie-word-embeddings", action="store_true", help="the embedding's weights serve the head too")


def _add_vocabulary(add):
    add("--make-vocab-size-divisible-by", type=values.positive_int, metavar="N",
        help="pad the embedding to a multiple of N x tensor ranks; exports are without (no padding)")
    add("--padded-vocab-size", type=values.positive_int, help=argparse.SUPPRESS)
    add("--extra-vocab-size", type=values.count, help=argparse.SUPPRESS)
    add("--norm-topk-prob", action="store_true", help=argparse.SUPPRESS)


def add_moe(parser):
    group = parser.add_argument_group("mixture of experts and its losses")
    add = group.add_argument
    add("--moe-layer-freq", type=values.layer_pattern, metavar="N|LIST",
        help='every N-th layer has experts, or a list such as "([0]*3+[1]*58)"')
    add("--moe-shared-expert-intermediate-size", type=values.count, help="width of all shared experts together")
    add("--moe-router-score-function", type=str, dest="scoring_func", choices=("softmax", "sigmoid"),
        help="affinity scores")
    add("--moe-router-enable-expert-bias", action="store_true", help="V3's balancing without an auxiliary loss")
    add("--moe-router-bias-update-rate", type=values.non_negative, help="speed of that bias (0.001 where there is one)")
    until = group.add_mutually_exclusive_group()
    until.add_argument("--moe-router-bias-update-until", type=values.count, metavar="ITERATION",
                       help="the bias stays as it is from this iteration (never)")
    until.add_argument("--moe-router-bias-update-samples", type=values.count,
                       help="the same, in samples")
    add("--moe-router-load-balancing-type", type=str, choices=("none", "seq_aux_loss", "aux_loss"),
        help="balance loss over a sequence or a micro-batch (the config's aux_loss_alpha and seq_aux decide)")
    add("--moe-aux-loss-coeff", type=values.non_negative, help="weight of that loss (the config's aux_loss_alpha)")
    add("--moe-device-aux-loss-coeff", type=values.non_negative, default=0.0,
        help="V2's balance over groups of experts (0)")
    add("--moe-communication-aux-loss-coeff", type=values.non_negative, default=0.0,
        help="V2's balance of what groups receive (0)")
    add("--moe-router-force-load-balancing", action="store_true",
        help="benchmarks only: every expert gets as many tokens, whatever the scores")
    add("--moe-expert-capacity-factor", type=values.positive,
        help="an expert takes at most so many times its even share of a sequence's tokens; others drop (no limit)")
    add("--moe-token-drop-policy", type=str, choices=DROP_POLICIES,
        help="which tokens an expert keeps then: those of the largest weights, or the first of the sequence (probs)")
    add("--moe-pad-expert-input-to-capacity", action="store_true", help=argparse.SUPPRESS)
    add("--moe-shared-expert-overlap", action="store_true",
        help="on CUDA the shared expert computes while tokens travel to the others")
    add("--overlap-moe-expert-parallel-comm", action="store_true",
        help="DualPipeV: the backward of one micro-batch computes while the forward of another sends tokens")
    add("--moe-token-dispatcher-type", type=str, choices=("allgather", "alltoall", "grouped"), default="alltoall",
        help="how tokens reach their experts; grouped crosses between nodes once a node (alltoall)")
    add("--moe-ranks-per-node", type=values.positive_int,
        help="ranks on a node, for grouped and for the count of bytes (torchrun's LOCAL_WORLD_SIZE)")
    add("--mtp-loss-scaling-factor", type=values.non_negative, default=0.3, help="weight of the MTP losses' mean (0.3)")


def add_rope(parser):
    group = parser.add_argument_group("context extension")
    group.add_argument("--rope-type", type=str, choices=("rope", *ROPE_KINDS),
                       help="rope is without scaling (the config's, or yarn once a factor is given)")
    for option, field, kind, text in ROPE_SCALING:
        group.add_argument(option, dest=f"rope_{field}", type=kind, help=text)
