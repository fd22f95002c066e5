#!/bin/bash
# Fine-tuning of DeepSeek-V2 or V2.5 (236B, 21B active) on NNODES=8 nodes of 8 GPUs with 80 GB, or on 16, 32, 48 ...
#
# MODEL= is the Hugging Face directory of the model (BF16), DATASET= the files of conversations, or weights and files;
# EVAL_DATASET= what is held out, OUT= also writes the result as a Hugging Face model. The same command goes on from the
# last checkpoint in SAVE once there is one. DATASET can be looked at before: ... --dry-run, and docs/finetuning.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-8}
require MODEL "the Hugging Face directory of the model: config.json, tokenizer.json and the safetensors files"
require DATASET "files of conversations, or weights and files"
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/finetune-v2}

case $((NNODES * GPUS_PER_NODE)) in
    64) PP=8 OFFLOAD=(--optimizer-cpu-offload) ;;
    128|256|384|512|768|1152|1536) PP=16 OFFLOAD=() ;;
    *) no_layout 64 128 256 384 512 768 1152 1536 ;;
esac

PARALLEL_ARGS=(
    --pipeline-model-parallel-size "$PP"
    --pipeline-schedule "${SCHEDULE:-ZBVZeroBubble}"
    --expert-model-parallel-size 8
    --recompute-granularity full
    "${OFFLOAD[@]}"
)
DATA_RANKS=$((NNODES * GPUS_PER_NODE / PP))

# BATCH= rows in an update at least; each data rank gets as many.
BATCH=${BATCH:-256}
count BATCH
BATCH=$(((BATCH + DATA_RANKS - 1) / DATA_RANKS * DATA_RANKS))

MODEL_ARGS=(--model "$MODEL")

TRAINING_ARGS=(
    --recipe deepseek-v3                         # as V2's report, section 4.1: 2 epochs at 5e-6
    --bf16
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size "$BATCH"
)

# Several files with weights: DATASET="0.7 chats.jsonl 0.3 code.jsonl", hence without quotes.
DATA_ARGS=(--dataset $DATASET --tokenizer-model "${TOKENIZER:-$MODEL}" --template deepseek-v2 --num-workers 16)
[ -z "${EVAL_DATASET:-}" ] || DATA_ARGS+=(--eval-dataset $EVAL_DATASET --eval-interval 50)

OUTPUT_ARGS=(
    --save "$SAVE"
    --load "$MODEL"
    --save-interval 100
    --keep-last 2
    --distributed-timeout-minutes 60
)
[ -z "${OUT:-}" ] || OUTPUT_ARGS+=(--save-hf "$OUT")

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
