#!/bin/bash
# Fine-tuning of DeepSeek-V2-Lite (15.7B, 2.4B active) on one node of 8 GPUs with 80 GB, or NNODES=2, 4, ... 64.
#
# MODEL= is the Hugging Face directory of the model (BF16), DATASET= the files of conversations, or weights and files;
# EVAL_DATASET= what is held out, OUT= also writes the result as a Hugging Face model. The same command goes on from the
# last checkpoint in SAVE once there is one. DATASET can be looked at before: ... --dry-run, and docs/finetuning.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
require MODEL "the Hugging Face directory of the model: config.json, tokenizer.json and the safetensors files"
require DATASET "files of conversations, or weights and files"
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/finetune-v2-lite}

case $((NNODES * GPUS_PER_NODE)) in
    8|16|32|64|128|256|512) ;;
    *) no_layout 8 16 32 64 128 256 512 ;;
esac

PARALLEL_ARGS=(
    --expert-model-parallel-size 8
    --data-parallel-sharding-strategy optim_grads_params
    --recompute-granularity full
)
DATA_RANKS=$((NNODES * GPUS_PER_NODE))

# BATCH= rows in an update at least; each data rank gets as many.
BATCH=${BATCH:-128}
count BATCH
BATCH=$(((BATCH + DATA_RANKS - 1) / DATA_RANKS * DATA_RANKS))

MODEL_ARGS=(--model "$MODEL")

TRAINING_ARGS=(
    --recipe deepseek-v3                         # V2's report has no more of it: section 4.1 names 2 epochs and 5e-6
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
