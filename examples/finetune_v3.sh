#!/bin/bash
# Fine-tuning of DeepSeek-V3 or V3-0324 (671B, 37B active) on NNODES=16 nodes of 8 GPUs with 80 GB, or on 32, 64, 128 ...
# The recipe is that of the V3 report, section 5.1: cosine from 5e-6 to 1e-6 over 2 epochs. For V3.1 give
# TEMPLATE=deepseek-v3.1.
#
# MODEL= is the Hugging Face directory of the model (BF16 or the released FP8), DATASET= the files of conversations, or weights and files;
# EVAL_DATASET= what is held out, OUT= also writes the result as a Hugging Face model. The same command goes on from the
# last checkpoint in SAVE once there is one. DATASET can be looked at before: ... --dry-run, and docs/finetuning.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-16}
require_finetuning
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/finetune-v3}

# Batches are smaller than in pre-training: a schedule that takes any number of micro-batches, where none is asked for.
SCHEDULE=${SCHEDULE:-ZBVZeroBubble}
deepseek_v3_layout  # sets PARALLEL_ARGS by the number of GPUs
DATA_RANKS=$((NNODES * GPUS_PER_NODE / 16))

rows_of_update 256  # sets BATCH

MODEL_ARGS=(--model "$MODEL" --mtp-loss-scaling-factor 0.1)

TRAINING_ARGS=(
    --recipe deepseek-v3                         # cosine from 5e-6 to 1e-6 over 2 epochs
    --bf16
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size "$BATCH"
)

finetuning_files "${TEMPLATE:-deepseek-v3}"  # sets DATA_ARGS and OUTPUT_ARGS

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
