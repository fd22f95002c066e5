#!/bin/bash
# Fine-tuning of DeepSeek-V2-Lite (15.7B, 2.4B active) on one node of 8 GPUs with 80 GB, or NNODES=2, 4, ... 64.
#
# MODEL= is the Hugging Face directory of the model (BF16), DATASET= the files of conversations, or weights and files;
# EVAL_DATASET= what is held out, OUT= also writes the result as a Hugging Face model. The same command goes on from the
# last checkpoint in SAVE once there is one. DATASET can be looked at before: ... --dry-run, and docs/finetuning.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
require_finetuning
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

rows_of_update 128  # sets BATCH

MODEL_ARGS=(--model "$MODEL")

TRAINING_ARGS=(
    --recipe deepseek-v3                         # V2's report has no more of it: section 4.1 names 2 epochs and 5e-6
    --bf16
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size "$BATCH"
)

finetuning_files deepseek-v2  # sets DATA_ARGS and OUTPUT_ARGS

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
