#!/bin/bash
# Fine-tuning of DeepSeek-V2 or V2.5 (236B, 21B active) on NNODES=8 nodes of 8 GPUs with 80 GB, or on 16, 32, 48 ...
#
# MODEL= is the Hugging Face directory of the model (BF16), DATASET= the files of conversations, or weights and files;
# EVAL_DATASET= what is held out, OUT= also writes the result as a Hugging Face model. The same command goes on from the
# last checkpoint in SAVE once there is one. DATASET can be looked at before: ... --dry-run, and docs/finetuning.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-8}
require_finetuning
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

rows_of_update 256  # sets BATCH

MODEL_ARGS=(--model "$MODEL")

TRAINING_ARGS=(
    --recipe deepseek-v3                         # as V2's report, section 4.1: 2 epochs at 5e-6
    --bf16
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size "$BATCH"
)

finetuning_files deepseek-v2  # sets DATA_ARGS and OUTPUT_ARGS

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
