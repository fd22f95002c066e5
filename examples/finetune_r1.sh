#!/bin/bash
# Fine-tuning of DeepSeek-V3's architecture on reasoning, as R1 (671B, 37B active), on NNODES=16 nodes of 8 GPUs with 80 GB,
# or on 32, 64, 128 ... The recipe is R1's, appendix B.4.2: cosine from 5e-5 to 5e-6, 128 rows of 32,768 tokens, which 8
# GPUs share. MODEL= is V3's base or R1. RECIPE=scienceone is that of ScienceOne's guide instead.
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
SAVE=${SAVE:-runs/finetune-r1}

# Batches are smaller than in pre-training: a schedule that takes any number of micro-batches, where none is asked for.
SCHEDULE=${SCHEDULE:-ZBVZeroBubble}
deepseek_v3_layout  # sets PARALLEL_ARGS by the number of GPUs
PARALLEL_ARGS+=(--context-parallel-size 8)
DATA_RANKS=$((NNODES * GPUS_PER_NODE / 128))

rows_of_update 128  # sets BATCH

MODEL_ARGS=(--model "$MODEL" --mtp-loss-scaling-factor 0.1)

TRAINING_ARGS=(
    --recipe "${RECIPE:-deepseek-r1}"            # cosine from 5e-5 to 5e-6 over 2 epochs
    --bf16
    --seq-length 32768
    --micro-batch-size 1
    --global-batch-size "$BATCH"
)

finetuning_files "${TEMPLATE:-deepseek-r1}"  # sets DATA_ARGS and OUTPUT_ARGS

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
