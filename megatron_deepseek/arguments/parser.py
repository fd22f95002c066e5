"""The command line of pre-training: Megatron-LM's argument names, in groups. Says nothing about what fits together.

Every architecture argument defaults to None and is stored under the field of ModelConfig that it overrides, so that
only what was given overrides the preset.
"""

import argparse
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.parallel.schedule_rules import SCHEDULES
from megatron_deepseek.presets import preset_names
from megatron_deepseek.training.schedules import DECAY_STYLES, WSD_DECAY_STYLES

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "ByteTokenizer", "NullTokenizer")
CP_COMM_TYPES = ("ring", "allgather")
FP8_FORMATS = ("e4m3", "hybrid")
FP8_RECIPES = ("blockwise", "tensorwise", "delayed", "mxfp8")
NAN_POLICIES = ("stop", "skip")
DROP_POLICIES = ("probs", "position")
MOMENT_DTYPES = ("fp32", "bf16", "fp16", "fp8")  # Megatron-LM's; refusals.py refuses the last two
RECOMPUTE_MODULES = ("layernorm", "mla_up_proj", "moe_act")

# (option, field of ModelConfig, type, help)
ARCHITECTURE = (
    ("--num-layers", "num_hidden_layers", values.positive_int, "decoder layers, MTP modules not counted"),
    ("--hidden-size", "hidden_size", values.positive_int, "width of the residual stream"),
    ("--ffn-hidden-size", "intermediate_size", values.positive_int, "width of the dense layers' MLP"),
    ("--num-attention-heads", "num_attention_heads", values.positive_int, "attention heads"),
    ("--vocab-size", "vocab_size", values.positive_int, "rows of the embedding"),
    ("--max-position-embeddings", "max_position_embeddings", values.positive_int, "longest sequence, in tokens"),
    ("--q-lora-rank", "q_lora_rank", values.count, "rank of the queries' compression; 0 for none"),
    ("--kv-lora-rank", "kv_lora_rank", values.positive_int, "rank of the latent that keys and values share"),
    ("--qk-head-dim", "qk_nope_head_dim", values.positive_int, "head size of queries and keys without the rotary part"),
    ("--qk-pos-emb-head-dim", "qk_rope_head_dim", values.positive_int, "rotary part of the head size"),
    ("--v-head-dim", "v_head_dim", values.positive_int, "head size of values"),
    ("--num-experts", "n_routed_experts", values.count, "routed experts; 0 for a dense model"),
    ("--moe-ffn-hidden-size", "moe_intermediate_size", values.positive_int, "width of one expert"),
    ("--moe-router-topk", "num_experts_per_tok", values.positive_int, "routed experts for each token"),
    ("--moe-router-num-groups", "n_group", values.positive_int, "groups of experts (nodes) for limited routing"),
    ("--moe-router-group-topk", "topk_group", values.positive_int, "groups that a token may reach"),
    ("--moe-router-topk-scaling-factor", "routed_scaling_factor", values.positive, "factor on the experts' output"),
    ("--mtp-num-layers", "num_nextn_predict_layers", values.count, "Multi-Token Prediction modules"),
    ("--rotary-base", "rope_theta", values.positive, "base of the rotary frequencies"),
    ("--norm-epsilon", "rms_norm_eps", values.positive, "epsilon of RMSNorm"),
    ("--init-method-std", "initializer_range", values.positive, "standard deviation of the initial weights"),
    ("--attention-dropout", "attention_dropout", values.fraction, "accepted as 0 only"),
)
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
# What Megatron-LM's scripts say and what every model here is anyway.
ALWAYS_ON = ("--multi-latent-attention", "--swiglu", "--disable-bias-linear", "--qk-layernorm", "--use-mcore-models",
             "--moe-grouped-gemm", "--moe-router-pre-softmax", "--use-distributed-optimizer",
             "--use-precision-aware-optimizer", "--exit-signal-handler", "--no-load-rng", "--no-save-rng")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ValueErrors of one line, without the usage."""

    def error(self, message: str):
        raise ValueError(message.removeprefix("argument "))


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="pretrain_deepseek.py", allow_abbrev=False,
                           formatter_class=argparse.MetavarTypeHelpFormatter,
                           usage="torchrun ... pretrain_deepseek.py --model NAME --data-path PREFIX ...",
                           description="Pre-train a DeepSeek model. Defaults are given in parentheses.",
                           epilog="examples/ has scripts that start it for each model, on one node and on many.")
    for add in (_add_model, _add_moe, _add_rope, _add_parallel, _add_batch, _add_learning_rate, _add_optimizer,
                add_data, _add_checkpoint, _add_end_and_health,
                _add_evaluation_and_logging, _add_recompute, _add_accepted):
        add(parser)
    return parser


def _add_model(parser):
    group = parser.add_argument_group("model", "explicit arguments override the preset or file")
    group.add_argument("--model", type=str, required=True, metavar="NAME|PATH",
                       help=f"{', '.join(preset_names())}, or a Hugging Face config.json")
    for option, field, kind, text in ARCHITECTURE:
        group.add_argument(option, dest=field, type=kind, help=text)
    tie = group.add_mutually_exclusive_group()
    tie.add_argument("--untie-embeddings-and-output-weights", action="store_true", help="own weights for the head")
    tie.add_argument("--tie-word-embeddings", action="store_true", help="the embedding's weights serve the head too")


def _add_moe(parser):
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
        help="an expert takes so many times its even share of a sequence's tokens, the rest is dropped (no limit)")
    add("--moe-token-drop-policy", type=str, choices=DROP_POLICIES,
        help="what is kept below that: the largest weights, or the first of the sequence (probs)")
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


def _add_rope(parser):
    group = parser.add_argument_group("context extension")
    group.add_argument("--rope-type", type=str, choices=("rope", "linear", "dynamic", "yarn"),
                       help="rope is without scaling (the config's, or yarn once a factor is given)")
    for option, field, kind, text in ROPE_SCALING:
        group.add_argument(option, dest=f"rope_{field}", type=kind, help=text)


def _add_parallel(parser):
    group = parser.add_argument_group("parallelism", "what is left of the ranks is data parallel")
    add = group.add_argument
    add("--tensor-model-parallel-size", type=values.positive_int, default=1, help="ranks that share each matrix")
    add("--pipeline-model-parallel-size", type=values.positive_int, default=1, help="ranks that share the layers")
    add("--expert-model-parallel-size", type=values.positive_int, default=1, help="ranks that share the experts")
    add("--context-parallel-size", type=values.positive_int, default=1, help="ranks that share each sequence")
    add("--cp-comm-type", type=str, choices=CP_COMM_TYPES, default="ring",
        help="how they pass on what keys and values are made of (ring)")
    add("--expert-tensor-parallel-size", type=values.positive_int, default=1,
        help="ranks that share the width of each expert")
    add("--explain-layout", type=values.positive_int, metavar="RANKS",
        help="print which of so many ranks holds what, and leave")
    add("--sequence-parallel", action="store_true", help="shard activations between tensor-parallel regions")
    add("--pipeline-schedule", type=str, choices=SCHEDULES,
        help="a schedule of torch.distributed.pipelining (1F1B; with virtual stages Interleaved1F1B)")
    stages = group.add_mutually_exclusive_group()
    stages.add_argument("--pipeline-model-parallel-layout", type=str, metavar="LAYOUT",
                        help='stages by hand: E t m L | *n, as in "Ettt|(tt|)*29,m|L" (balanced by cost)')
    stages.add_argument("--num-virtual-stages-per-pipeline-rank", type=values.positive_int,
                        help="stages on each rank, balanced by cost (2 where the schedule needs several)")
    stages.add_argument("--num-layers-per-virtual-pipeline-stage", type=values.positive_int,
                        help="exactly so many layers on each stage")
    for end in ("first", "last"):
        add(f"--decoder-{end}-pipeline-num-layers", type=values.positive_int,
            help=f"layers of the {end} pipeline rank; ranks without such a number share the rest evenly")
    add("--data-parallel-sharding-strategy", type=str, choices=("optim_grads", "optim_grads_params"),
        default="optim_grads", help="what FSDP keeps sharded outside a layer's computation (optim_grads)")
    add("--distributed-timeout-minutes", type=values.positive, default=10.0, help="for a collective (10)")


def _add_batch(parser):
    group = parser.add_argument_group("length and batch")
    length = group.add_mutually_exclusive_group(required=True)
    length.add_argument("--train-iters", type=values.positive_int, help="iterations")
    length.add_argument("--train-samples", type=values.positive_int, help="sequences; iterations follow from batches")
    add = group.add_argument
    add("--micro-batch-size", type=values.positive_int, default=1, help="sequences in one forward pass (1)")
    add("--global-batch-size", type=values.positive_int, help="sequences in an update (micro-batch x data ranks)")
    add("--rampup-batch-size", type=values.count, nargs=3, metavar=("START", "INCREMENT", "SAMPLES"),
        help="grow the global batch from START over the first SAMPLES")
    add("--seq-length", type=values.positive_int, default=4096, help="tokens of a training sequence (4096)")
    add("--seed", type=values.count, default=1234, help="of weights and of the order of samples (1234)")
    add("--bf16", action="store_true", help="compute in bfloat16, keep weights in float32 (compute in float32)")
    add("--fp8-format", type=str, choices=FP8_FORMATS,
        help="products of attention, MLP and experts in FP8; e4m3 is DeepSeek-V3's (none)")
    add("--fp8-recipe", type=str, choices=FP8_RECIPES, help="where its scales come from (blockwise)")
    add("--fp8-param-gather", action="store_true", help="gather FP8 weights over data ranks as FP8, half the bytes")


def _add_learning_rate(parser):
    group = parser.add_argument_group("learning rate", "follows the samples consumed; an iteration is as many as its "
                                      "batch has")
    add = group.add_argument
    add("--lr", type=values.non_negative, default=2.2e-4, help="peak (2.2e-4)")
    add("--min-lr", type=values.non_negative, help="end of the decay (0; with deepseek-v3 a tenth of --lr)")
    add("--lr-decay-style", type=str, choices=DECAY_STYLES, default="cosine", help="(cosine)")
    decay = group.add_mutually_exclusive_group()
    decay.add_argument("--lr-decay-iters", type=values.positive_int, help="where the decay ends (the run's length)")
    decay.add_argument("--lr-decay-samples", type=values.positive_int, help="the same, in samples")
    warmup = group.add_mutually_exclusive_group()
    warmup.add_argument("--lr-warmup-iters", type=values.count, help="linear rise (0)")
    warmup.add_argument("--lr-warmup-samples", type=values.count, help="the same, in samples")
    warmup.add_argument("--lr-warmup-fraction", type=values.fraction, help="the same, as a part of the decay length")
    add("--lr-warmup-init", type=values.non_negative, default=0.0, help="where the rise begins (0)")
    anneal = group.add_mutually_exclusive_group()
    anneal.add_argument("--lr-wsd-decay-iters", type=values.positive_int, help="WSD: length of the final fall")
    anneal.add_argument("--lr-wsd-decay-samples", type=values.positive_int, help="the same, in samples")
    add("--lr-wsd-decay-style", type=str, choices=WSD_DECAY_STYLES, default="linear", help="WSD: its form (linear)")
    add("--lr-constant-fraction", type=values.fraction, default=10 / 14.8, help="deepseek-v3: at --lr (10/14.8)")
    add("--lr-cosine-fraction", type=values.fraction, default=4.3 / 14.8, help="deepseek-v3: falling (4.3/14.8)")
    add("--lr-final-fraction", type=values.fraction, default=0.167 / 14.8, help="deepseek-v3: at the end (0.167/14.8)")
    add("--lr-final", type=values.non_negative, help="deepseek-v3: rate at the end (7.3e-6 for an --lr of 2.2e-4)")


def _add_optimizer(parser):
    add = parser.add_argument_group("AdamW").add_argument
    add("--adam-beta1", type=values.beta, default=0.9, help="(0.9)")
    add("--adam-beta2", type=values.beta, default=0.95, help="(0.95)")
    add("--adam-eps", type=values.positive, default=1e-8, help="(1e-8)")
    add("--weight-decay", type=values.non_negative, default=0.1, help="(0.1)")
    add("--clip-grad", type=values.non_negative, default=1.0, help="largest norm of the gradient; 0 does not clip (1)")
    add("--exp-avg-dtype", type=str, choices=MOMENT_DTYPES, default="fp32",
        help="what the first moment is kept in; it is updated in float32 (fp32; bf16)")
    add("--exp-avg-sq-dtype", type=str, choices=MOMENT_DTYPES, default="fp32",
        help="the same for the second moment (fp32; bf16)")


def add_data(parser):
    add = parser.add_argument_group("data", "given once: by --data-path or --data-args-path, cut by --split, or for "
                                    "each split its own").add_argument
    add("--data-path", type=str, nargs="+", metavar="PREFIX", help="a prefix of .bin/.idx, or WEIGHT PREFIX ...")
    add("--data-args-path", type=Path, metavar="FILE", help="a file that holds what --data-path takes")
    add("--split", type=values.split, metavar="A,B,C", default="969,30,1",
        help="weights of train, valid, test (969,30,1)")
    for name in ("train", "valid", "test"):
        add(f"--{name}-data-path", type=str, nargs="+", metavar="PREFIX", help=f"the same for {name} alone, uncut")
    add("--per-split-data-args-path", type=Path, metavar="FILE",
        help='JSON with these three: {"train": [WEIGHT, PREFIX, ...], "valid": [...], "test": [...]}')
    add("--data-cache-path", type=str, metavar="DIR", help="where sample indices are kept (beside the data)")
    add("--tokenizer-type", type=str, choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0],
        help=f"({TOKENIZER_TYPES[0]})")
    add("--tokenizer-model", type=str, metavar="PATH",
        help="tokenizer.json or a directory with one; for NullTokenizer the number of ids")
    add("--reset-attention-mask", action="store_true",
        help="tokens attend to their own document only, and MTP does not predict across documents")
    add("--reset-position-ids", action="store_true",
        help="accepted with --reset-attention-mask: rotary scores depend on distances alone")
    add("--eod-mask-loss", action="store_true", help="no loss on end-of-document tokens")


def _add_checkpoint(parser):
    add = parser.add_argument_group("checkpoints").add_argument
    add("--save", type=Path, metavar="DIR", help="for checkpoints and metrics.jsonl")
    add("--save-interval", type=values.positive_int, help="iterations between checkpoints (one, at the end)")
    add("--save-every-seconds", type=values.positive, metavar="SECONDS", help="also after so much time without one")
    add("--async-save", action="store_true", help="copy to memory, and write in the background while training goes on")
    add("--keep-last", type=values.positive_int, metavar="N", help="remove all but the newest N checkpoints (keep all)")
    add("--no-save-optim", action="store_true", help="save weights without the optimizer's state")
    add("--save-hf", type=Path, metavar="DIR", help="at the end, also as a Hugging Face model (bf16 with --bf16)")
    add("--load", type=Path, metavar="DIR", help="continue from the last checkpoint there; when it is the --save "
        "directory, the first start, without a checkpoint, begins anew; a Hugging Face directory gives the weights")
    add("--ckpt-step", type=values.count, metavar="ITERATION", help="of --load, this checkpoint instead of the last")
    add("--finetune", action="store_true", help="load weights only, begin at iteration 0")
    add("--no-load-optim", action="store_true", help="begin with fresh optimizer state")


def _add_end_and_health(parser):
    group = parser.add_argument_group("end and health of a run", "SIGTERM and SIGUSR1 save and leave after the step")
    add = group.add_argument
    add("--exit-interval", type=values.positive_int, help="save and leave at an iteration that this divides")
    add("--exit-duration-in-mins", type=values.positive, metavar="MINUTES", help="save and leave after so much time")
    add("--nan-policy", type=str, choices=NAN_POLICIES, default="stop",
        help="what follows a loss or gradient that is not finite: stop the run, or skip the update (stop)")
    add("--max-skipped-steps", type=values.positive_int, metavar="N", help="skips in a row before the run stops (10)")


def _add_evaluation_and_logging(parser):
    add = parser.add_argument_group("evaluation and logging").add_argument
    add("--eval-iters", type=values.count, help="batches of an evaluation (0: none)")
    add("--eval-interval", type=values.positive_int, help="iterations between evaluations (1000)")
    add("--log-interval", type=values.positive_int, default=1, help="iterations between lines (1)")
    add("--tensorboard-dir", type=Path, metavar="DIR", help="also write TensorBoard events")
    add("--profile", action="store_true", help="write a trace of the steps below with torch.profiler")
    add("--profile-step-start", type=values.count, default=10, help="(10)")
    add("--profile-step-end", type=values.count, default=12, help="(12)")


def _add_recompute(parser):
    add = parser.add_argument_group("recomputation and offloading", "memory for time; no number changes").add_argument
    add("--recompute-granularity", type=str, choices=("full", "selective"), help="whole layers, or the modules below")
    add("--recompute-modules", type=str, nargs="+", choices=RECOMPUTE_MODULES, help="for selective (all of them)")
    add("--recompute-method", type=str, choices=("uniform",), help="for full: each layer by itself, the only method")
    add("--recompute-num-layers", type=values.positive_int, help="for full: 1, as each layer is by itself")
    add("--cpu-offloading-num-layers", type=values.count, default=0,
        help="layers of each stage, the first ones, whose activations wait in the host's memory (0)")
    add("--optimizer-cpu-offload", action="store_true",
        help="master weights, gradients and moments in the host's memory, updated there")


def _add_accepted(parser):
    group = parser.add_argument_group("accepted from Megatron-LM's scripts", "they say what holds here anyway")
    for option in ALWAYS_ON:
        group.add_argument(option, action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--normalization", type=str, choices=("RMSNorm",), help="RMSNorm")
    group.add_argument("--position-embedding-type", type=str, choices=("rope",), help="rope")
    for option in ("--moe-router-dtype", "--main-grads-dtype", "--main-params-dtype"):
        group.add_argument(option, type=str, choices=("fp32",), help="fp32")
    group.add_argument("--hidden-dropout", type=values.fraction, help="0")
    group.description += ": " + " ".join(ALWAYS_ON)
