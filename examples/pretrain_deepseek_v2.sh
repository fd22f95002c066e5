#!/bin/bash
# DeepSeek-V2 (236B, 21B active) on NNODES=16 nodes of 8 GPUs or more: PP16 with a zero-bubble schedule, EP8. On 8 nodes
# PP8. What does not fit in 80 GB (docs/quickstart_cluster.md) is recomputed or moved to the hosts' memory. The recipe is
# that of the DeepSeek-V2 report, section 3.1.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-16}
require DATA_PATH "the prefix of a .bin/.idx, or weights and prefixes"
require TOKENIZER "the tokenizer.json of DeepSeek-V2"
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/deepseek-v2}

MODEL_ARGS=(
    --model deepseek-v2
    --rope-type rope                     # the release's YaRN comes after pre-training
    --max-position-embeddings 4096
    --init-method-std 0.006
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 0.003
    --moe-device-aux-loss-coeff 0.05
    --moe-communication-aux-loss-coeff 0.02
)

# Every size of the batch ramp divides among the data ranks: a sixteenth of the GPUs, which divides 288.
case $((NNODES * GPUS_PER_NODE)) in
    64) PP=8 RECOMPUTE=${RECOMPUTE:-full} OFFLOAD=(--optimizer-cpu-offload) ;;
    128|256) PP=16 RECOMPUTE=${RECOMPUTE:-full} OFFLOAD=() ;;
    384|512|768|1152|1536|2304|4608) PP=16 RECOMPUTE=${RECOMPUTE:-selective} OFFLOAD=() ;;
    *) no_layout 64 128 256 384 512 768 1152 1536 2304 4608 ;;
esac

PARALLEL_ARGS=(
    --pipeline-model-parallel-size "$PP"
    --pipeline-schedule "${SCHEDULE:-ZBVZeroBubble}"
    --expert-model-parallel-size 8
    --recompute-granularity "$RECOMPUTE"
    "${OFFLOAD[@]}"
)

TRAINING_ARGS=(
    --bf16
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size 9216
    --rampup-batch-size 2304 864 54931640  # over 225B tokens
    --train-samples 1977539062           # 8.1T tokens
    --lr 2.4e-4
    --lr-decay-style cosine              # the report's falls in two steps, at 60 % and 90 %
    --min-lr 2.4e-5
    --lr-warmup-samples 4608000          # 2,000 batches of the first size
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
)

# Several prefixes with weights: DATA_PATH="0.7 /data/web 0.3 /data/code", hence without quotes.
DATA_ARGS=(--data-path $DATA_PATH --tokenizer-model "$TOKENIZER" --split 999,1,0)

OUTPUT_ARGS=(
    --save "$SAVE"
    --load "$SAVE"
    --save-interval 500
    --eval-interval 500
    --eval-iters 2
    --tensorboard-dir "$SAVE/tensorboard"
    --distributed-timeout-minutes 30
)

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
