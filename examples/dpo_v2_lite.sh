#!/bin/bash
# DPO of DeepSeek-V2-Lite (15.7B, 2.4B active) on one node of 8 GPUs with 80 GB, or NNODES=2, 4, ... 64.
#
# MODEL= is the Hugging Face directory of the model (BF16), which is also the reference; DATASET= the files of pairs, or
# weights and files; EVAL_DATASET= what is held out, OUT= also writes the result as a Hugging Face model. OBJECTIVE= is
# dpo, or ipo, hinge, kto, orpo, simpo; BETA= its beta. The same command goes on from the last checkpoint in SAVE once
# there is one. DATASET can be looked at before: ... --dry-run, and docs/preference.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
require_finetuning
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/dpo-v2-lite}

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

rows_of_update 64  # sets BATCH

MODEL_ARGS=(--model "$MODEL")

PREFERENCE_ARGS=(
    --objective "${OBJECTIVE:-dpo}"
    ${BETA:+--beta "$BETA"}                      # 0.1, of simpo 2
)

TRAINING_ARGS=(
    --epochs 1
    --lr 1e-6                                    # TRL's
    --min-lr 1e-7
    --lr-warmup-fraction 0.1
    --moe-router-load-balancing-type none        # pairs are few, and rows no sample of what the experts see
    --bf16
    --seq-length 4096                            # of a row: a side of a pair has at most half of it
    --micro-batch-size 1
    --global-batch-size "$BATCH"
)

finetuning_files deepseek-v2  # sets DATA_ARGS and OUTPUT_ARGS

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${PREFERENCE_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" "$@"
