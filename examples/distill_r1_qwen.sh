#!/bin/bash
# Distillation of a dense student, DeepSeek-R1-Distill-Qwen-1.5B, from a larger one with the same tokenizer, such as
# DeepSeek-R1-Distill-Qwen-7B, which is read in the same job: on one node of 8 GPUs with 80 GB, or NNODES=2, 4, ... 64.
#
# MODEL= is the Hugging Face directory of the student, TEACHER= that of the teacher, or a cache that
# tools/cache_logits.py has made of it; DATASET= the files of conversations, or weights and files; EVAL_DATASET= what is
# held out, OUT= also writes the result as a Hugging Face model. RATIO= is the weight of the teacher against the labels.
# The same command goes on from the last checkpoint in SAVE once there is one. docs/distillation.md has more.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
require_finetuning
require TEACHER "the Hugging Face directory of the teacher, or a cache of what it predicts"
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/distill-r1-qwen}

case $((NNODES * GPUS_PER_NODE)) in
    8|16|32|64|128|256|512) ;;
    *) no_layout 8 16 32 64 128 256 512 ;;
esac

PARALLEL_ARGS=(
    --tensor-model-parallel-size 4               # the teacher's too
    --sequence-parallel
    --recompute-granularity full
)
DATA_RANKS=$((NNODES * GPUS_PER_NODE / 4))

rows_of_update 128  # sets BATCH

MODEL_ARGS=(--model "$MODEL")

TEACHER_ARGS=(
    --teacher "$TEACHER"
    --kd-ratio "${RATIO:-0.9}"
)

TRAINING_ARGS=(
    --recipe deepseek-r1
    --bf16
    --seq-length 16384
    --micro-batch-size 1
    --global-batch-size "$BATCH"
)

finetuning_files "${TEMPLATE:-deepseek-r1}"  # sets DATA_ARGS and OUTPUT_ARGS

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TEACHER_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" "$@"
