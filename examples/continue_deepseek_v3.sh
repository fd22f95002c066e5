#!/bin/bash
# Continued pre-training of DeepSeek-V3, V3-0324, V3.1 or R1 from their released files (MODEL=, FP8 or BF16) on NNODES=16
# nodes of 8 GPUs with 80 GB, or on 32, 64, 128 ...: docs/quickstart_cluster.md.
#
# The same command continues from the last checkpoint in SAVE once there is one. Learning rate and schedule are those of
# V3's own extension (report, section 4.3): constant, 7.3e-6. OUT= also writes the result as a Hugging Face model.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-16}
require MODEL "the Hugging Face directory of the model: config.json, tokenizer.json and the safetensors files"
require DATA_PATH "the prefix of a .bin/.idx, or weights and prefixes"
count NNODES
count GPUS_PER_NODE
TOKENIZER=${TOKENIZER:-$MODEL}
SAVE=${SAVE:-runs/continue-deepseek-v3}
LOAD=$MODEL
[ ! -e "$SAVE/latest_checkpointed_iteration.txt" ] || LOAD=$SAVE

MODEL_ARGS=(
    --model "$MODEL"                     # its YaRN stays: the model was extended by it
    --moe-router-bias-update-rate 0.001
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 0.0001
    --mtp-loss-scaling-factor 0.1
)

deepseek_v3_layout  # sets PARALLEL_ARGS by the number of GPUs

DATA_RANKS=$((NNODES * GPUS_PER_NODE / 16))
TRAINING_ARGS=(
    --bf16
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size $((2048 % DATA_RANKS == 0 ? 2048 : 3072))
    --train-iters "${STEPS:-1000}"
    --lr 7.3e-6
    --lr-decay-style constant
    --lr-warmup-iters 50
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
)

# Several prefixes with weights: DATA_PATH="0.7 /data/web 0.3 /data/code", hence without quotes.
DATA_ARGS=(--data-path $DATA_PATH --tokenizer-model "$TOKENIZER" --split 999,1,0)

OUTPUT_ARGS=(
    --save "$SAVE"
    --load "$LOAD"
    --save-interval 100
    --eval-interval 100
    --eval-iters 2
    --distributed-timeout-minutes 60     # the first start reads 700 GB
)

[ -z "${OUT:-}" ] || OUTPUT_ARGS+=(--save-hf "$OUT")

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
