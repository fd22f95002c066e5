#!/bin/bash
# DeepSeek-V2 (236B, 21B active) on 16 nodes of 8 GPUs and multiples: PP16 with a zero-bubble schedule, EP8.
# Recipe: DeepSeek-V2 report, section 3.1.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-16}
DATA_PATH=${DATA_PATH:?is not set: the prefix of a .bin/.idx, or weights and prefixes}
TOKENIZER=${TOKENIZER:?is not set: the tokenizer.json of DeepSeek-V2}
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

PARALLEL_ARGS=(
    --pipeline-model-parallel-size 16
    --pipeline-schedule "${SCHEDULE:-ZBVZeroBubble}"
    --expert-model-parallel-size 8
    --recompute-granularity selective
    --recompute-modules layernorm mla_up_proj moe_act
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
