"""The command line of pre-training: Megatron-LM's argument names, in groups; validation.py says what fits together.

Fine-tuning has the same groups but for length and data (finetuning.py).
"""

import argparse

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.base_weights import add_base_weights
from megatron_deepseek.arguments.dry_run import add_dry_run
from megatron_deepseek.arguments.lora import add_lora
from megatron_deepseek.arguments.model_options import add_model, add_moe, add_rope
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.parallel.schedule_rules import SCHEDULES
from megatron_deepseek.training.schedules import DECAY_STYLES, WSD_DECAY_STYLES

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "ByteTokenizer", "NullTokenizer")
CP_COMM_TYPES = ("ring", "allgather")
FP8_FORMATS = ("e4m3", "hybrid")
FP8_SCALE_FORMATS = ("float32", "ue8m0")  # checkpoint/convert/block_fp8.py's, which needs torch
EXPORT_DTYPES = ("bf16", "fp32", "fp8")
FP8_RECIPES = ("blockwise", "tensorwise", "delayed", "mxfp8")
NAN_POLICIES = ("stop", "skip")
MOMENT_DTYPES = ("fp32", "bf16", "fp16", "fp8")  # Megatron-LM's; validation.py refuses the last two
RECOMPUTE_MODULES = ("layernorm", "mla_up_proj", "moe_act")

# What Megatron-LM's scripts say and what every model here is anyway.
ALWAYS_ON = ("--multi-latent-attention", "--swiglu", "--disable-bias-linear", "--qk-layernorm", "--use-mcore-models",
             "--moe-grouped-gemm", "--moe-router-pre-softmax", "--use-distributed-optimizer",
             "--use-precision-aware-optimizer", "--exit-signal-handler", "--no-load-rng", "--no-save-rng")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="pretrain_deepseek.py", allow_abbrev=False,
                           formatter_class=argparse.MetavarTypeHelpFormatter,
                           usage="torchrun ... pretrain_deepseek.py --model NAME --data-path PREFIX ...",
                           description="Pre-train a DeepSeek model. Defaults are given in parentheses.",
                           epilog="examples/ has scripts that start it for each model, on one node and on many.")
    for add in (*BEFORE_LENGTH, _add_length_and_batch, *BETWEEN_LENGTH_AND_DATA, add_data, _add_reading, *AFTER_DATA):
        add(parser)
    return parser


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
    add("--auto-layout", type=str, metavar="GPU",
        help="take the layout that tools/plan.py search finds best for this GPU, in place of arguments for it")
    add("--all", action="store_true", help="with --explain-layout: every rank in a line of its own")
    add("--check-only", action="store_true",
        help="check the arguments for WORLD_SIZE ranks (environment; 1), and leave; no data are read")
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
    for part in ("embedding", "loss"):
        add(f"--account-for-{part}-in-pipeline-split", action="store_true", default=None,
            help=f"the {part} counts as a layer, and each stage gets as many of all these")
    add("--data-parallel-sharding-strategy", type=str, choices=("optim_grads", "optim_grads_params"),
        default="optim_grads", help="what FSDP keeps sharded outside a layer's computation (optim_grads)")
    add("--distributed-timeout-minutes", type=values.positive, default=10.0, help="for a collective (10)")


def _add_length_and_batch(parser):
    group = parser.add_argument_group("length and batch")
    add_lengths(group.add_mutually_exclusive_group(required=True))
    add_batch(group)


def add_lengths(length):
    length.add_argument("--train-iters", type=values.positive_int, help="iterations")
    length.add_argument("--train-samples", type=values.positive_int, help="sequences; iterations follow from batches")


def add_batch(group):
    add = group.add_argument
    add("--micro-batch-size", type=values.positive_int, default=1, help="sequences in one forward pass (1)")
    add("--loss-chunk-size", type=values.positive_int, metavar="TOKENS",
        help="of a forward pass; their logits exist at once, and are made again in the backward if there are more "
        "tokens (as many as a rank has logits of in 256 MiB)")
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
    add("--compile", action="store_true", help="compile what layers compute between products, attention and "
        "communication; the first step takes longer (docs/compile.md)")


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
    add("--freeze-parameters", "--freeze", type=str, nargs="+", metavar="PATTERN",
        help='parameters that are not trained, by name: "model.layers.*.mlp.experts.*" (none)')
    add("--clip-grad", type=values.non_negative, default=1.0, help="largest norm of the gradient; 0 does not clip (1)")
    add("--exp-avg-dtype", type=str, choices=MOMENT_DTYPES, default="fp32",
        help="what the first moment is kept in; it is updated in float32 (fp32; bf16)")
    add("--exp-avg-sq-dtype", type=str, choices=MOMENT_DTYPES, default="fp32",
        help="the same for the second moment (fp32; bf16)")


def add_data(parser):
    add = parser.add_argument_group("data", "given once: by --data-path or --data-args-path, cut by --split, or for "
                                    "each split its own").add_argument
    add("--data-path", type=str, nargs="+", metavar="PREFIX", help="a prefix of .bin/.idx, or WEIGHT PREFIX ...")
    add("--data-args-path", type=values.path, metavar="FILE", help="a file that holds what --data-path takes")
    add("--split", type=values.split, metavar="A,B,C", default="969,30,1",
        help="weights of train, valid, test (969,30,1)")
    add("--mock-data", action="store_true", help="data without meaning, made where it is missing, as for speed tests")
    for name in ("train", "valid", "test"):
        add(f"--{name}-data-path", type=str, nargs="+", metavar="PREFIX", help=f"the same for {name} alone, uncut")
    add("--per-split-data-args-path", type=values.path, metavar="FILE",
        help='JSON with these three: {"train": [WEIGHT, PREFIX, ...], "valid": [...], "test": [...]}')
    add("--data-cache-path", type=values.path_text, metavar="DIR",
        help="where sample indices are kept (beside the data)")
    add("--tokenizer-type", type=str, choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0],
        help=f"({TOKENIZER_TYPES[0]})")
    add("--tokenizer-model", type=str, metavar="PATH",
        help="tokenizer.json or a directory with one; for NullTokenizer the number of ids (--vocab-size - 1)")
    add("--reset-attention-mask", action="store_true",
        help="tokens attend to their own document only, and MTP does not predict across documents")
    add("--reset-position-ids", action="store_true",
        help="accepted with --reset-attention-mask: rotary scores depend on distances alone")
    add("--eod-mask-loss", action="store_true", help="no loss on end-of-document tokens")


def _add_reading(parser):
    add = parser.add_argument_group("reading and validation data").add_argument
    add("--num-workers", type=values.count, default=1, help="threads that read batches ahead (1)")
    add("--full-validation", action="store_true",
        help="an evaluation reads all validation data once, in place of --eval-iters batches")
    add("--multiple-validation-sets", action="store_true",
        help="each dataset of the validation data is evaluated by itself")
    add("--validation-set-names", type=str, nargs="+", metavar="NAME", help="of these sets (those of their files)")


def _add_checkpoint(parser):
    add = parser.add_argument_group("checkpoints").add_argument
    add("--save", type=values.path, metavar="DIR", help="for checkpoints and metrics.jsonl")
    add("--save-interval", type=values.positive_int, help="iterations between checkpoints (one, at the end)")
    add("--save-every-seconds", type=values.positive, metavar="SECONDS", help="also after so much time without one")
    add("--async-save", action="store_true", help="copy to memory, and write in the background while training goes on")
    add("--keep-last", type=values.positive_int, metavar="N", help="remove all but the newest N checkpoints (keep all)")
    add("--no-save-optim", action="store_true", help="save weights without the optimizer's state")
    add("--save-hf", type=values.path, metavar="DIR",
        help="at the end, also as a Hugging Face model")
    add("--save-hf-dtype", type=str, choices=EXPORT_DTYPES, help="of its weights (bf16 with --bf16, else fp32)")
    add("--fp8-scale-format", type=str, choices=FP8_SCALE_FORMATS,
        help="for --save-hf-dtype fp8: any value, or ue8m0, powers of two as in V3.1 (that of what the run began from, "
        "else float32)")
    add("--chat-template", type=str, metavar="NAME|FILE",
        help="for exports: deepseek-v3, deepseek-r1, deepseek-v3.1, or a file of yours (that of the tokenizer, if any)")
    add("--load", type=values.path, metavar="DIR",
        help="the --save directory, to continue what it holds; or what a new run "
        "starts from: the last checkpoint of another directory, or a Hugging Face directory's weights")
    add("--ckpt-step", type=values.count, metavar="ITERATION", help="of --load, this checkpoint instead of the last")
    add("--finetune", action="store_true", help="load weights only, begin at iteration 0")
    add("--no-load-optim", action="store_true", help="begin with fresh optimizer state")
    add("--init-mtp", action="store_true",
        help="give the MTP modules that --load lacks initial weights, and begin with fresh optimizer state")
    add("--overwrite", action="store_true", help="begin anew where --save holds another run, which is removed")


def _add_end_and_health(parser):
    group = parser.add_argument_group("end and health of a run", "SIGTERM and SIGUSR1 save and leave after the step")
    add = group.add_argument
    add("--exit-interval", type=values.positive_int, help="save and leave at an iteration that this divides")
    add("--exit-duration-in-mins", type=values.positive, metavar="MINUTES", help="save and leave after so much time")
    add("--nan-policy", type=str, choices=NAN_POLICIES, default="stop",
        help="what follows a loss or gradient that is not finite: stop the run, or skip the update (stop)")
    add("--check-weight-hash-across-dp-replicas-interval", type=values.positive_int, metavar="N",
        help="compare hashes of the weights of all ranks that have the same, every N iterations (never)")
    add("--manual-gc", action="store_true", help="Python collects garbage where the next two say, on all ranks at once")
    add("--manual-gc-interval", type=values.count, default=0, help="after every so many iterations (0: never)")
    add("--no-manual-gc-eval", action="store_false", dest="manual_gc_eval", help="not before and after evaluations")
    add("--max-skipped-steps", type=values.positive_int, metavar="N", help="skips in a row before the run stops (10)")


def _add_evaluation_and_logging(parser):
    add = parser.add_argument_group("evaluation and logging").add_argument
    add("--eval-iters", type=values.count, help="batches of an evaluation (0: none)")
    add("--eval-interval", type=values.positive_int, help="iterations between evaluations (1000)")
    add("--eval-tasks", type=str, nargs="+", metavar="TASK",
        help="tasks of lm-eval to evaluate while training: names, or YAML and JSON files (none)")
    add("--eval-tasks-interval", type=values.positive_int, metavar="N", help="iterations between that (1000)")
    add("--eval-tasks-limit", type=values.positive, metavar="N",
        help="examples of each task; below 1, a part of them (all)")
    add("--eval-tasks-num-fewshot", type=values.count, metavar="N", help="examples before a question (the task's)")
    add("--eval-tasks-include-path", type=values.path, metavar="DIR", help="a folder of further tasks (none)")
    add("--log-interval", type=values.positive_int, default=1, help="iterations between lines (1)")
    add("--log-throughput", action="store_true", help="also the model's TFLOP/s a rank")
    add("--log-params-norm", action="store_true", help="also the norm of what is trained")
    add("--log-num-zeros-in-grad", action="store_true", help="also how many numbers of the gradient are 0")
    add("--tensorboard-dir", type=values.path, metavar="DIR", help="also write TensorBoard events")
    add("--tensorboard-log-interval", type=values.positive_int, default=1, metavar="N",
        help="iterations between the events by Megatron-LM's names (1)")
    add("--tensorboard-queue-size", type=values.positive_int, default=1, metavar="N",
        help="events that wait in memory before they are written (1: none)")
    for name, what in (("timers", "iteration-time and throughput"), ("memory", "the accelerator's memory"),
                       ("validation-ppl", "the perplexity of validations"), ("world-size", "the number of ranks")):
        add(f"--log-{name}-to-tensorboard", action="store_true", help=f"there also {what}")
    add("--metrics-file", type=values.path, metavar="FILE", help="the newest numbers as OpenMetrics text")
    add("--wandb-project", type=str, metavar="NAME", help="also log to Weights & Biases; WANDB_MODE=offline to files")
    add("--wandb-exp-name", type=str, metavar="NAME", help="of the run there")
    add("--wandb-entity", type=str, metavar="NAME", help="whose project it is")
    add("--wandb-save-dir", type=values.path, metavar="DIR", help="for its files (SAVE/wandb)")
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


BEFORE_LENGTH = (add_model, add_moe, add_rope, _add_parallel)
BETWEEN_LENGTH_AND_DATA = (_add_learning_rate, _add_optimizer, add_lora, add_base_weights)
AFTER_DATA = (_add_checkpoint, _add_end_and_health, _add_evaluation_and_logging, _add_recompute, add_dry_run,
              _add_accepted)
