#!/bin/bash
# Reinforcement learning (GRPO) of DeepSeek-V2-Lite (15.7B, 2.4B active) on one node of 8 GPUs with 80 GB, or NNODES=2,
# 4, ... 64.
#
# MODEL= is the Hugging Face directory of the model (BF16), PROMPTS= the files of prompts, REWARD= the functions that
# judge answers ("math format:0.2"); EVAL_PROMPTS= is held out, OUT= also writes the result as a Hugging Face model. The
# same command goes on from the last checkpoint in SAVE once there is one. docs/grpo.md and docs/rewards.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
require_rewards
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/grpo-v2-lite}

case $((NNODES * GPUS_PER_NODE)) in
    8|16|32|64|128|256|512) ;;
    *) no_layout 8 16 32 64 128 256 512 ;;
esac

PARALLEL_ARGS=(
    --expert-model-parallel-size 8
    --data-parallel-sharding-strategy optim_grads_params
    --recompute-granularity full
)

MODEL_ARGS=(--model "$MODEL")

TRAINING_ARGS=(
    --train-iters "${STEPS:-500}"
    --lr 1e-6                                    # DeepSeekMath, section 4.2
    --lr-warmup-iters 10
    --moe-router-load-balancing-type none        # prompts are few, and their answers no sample of what experts see
    --bf16
    --seq-length 4096                            # of a row, in which samples share the place
    --micro-batch-size 1
    --clip-high 0.28                             # DAPO
    --loss-aggregation token-mean
    --overlong penalty
)

ROLLOUT_ARGS=(
    --grpo-prompts-per-step 64
    --grpo-group-size 16
    --max-completion-length 3072
    --keep-routing
    --dynamic-sampling
)

reward_files deepseek-v2  # sets DATA_ARGS and OUTPUT_ARGS

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" "$@"
