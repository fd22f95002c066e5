#!/bin/bash
# Reinforcement learning (GRPO) of DeepSeek-V3's base model (671B, 37B active) on NNODES=64 nodes of 8 GPUs with 80 GB, or
# on 128, 256 ...
# The numbers are R1-Zero's (Nature 645, 2025, Methods): learning rate 3e-6, 16 answers to each of 32 prompts, KL 0.001
# to a reference that is renewed every 400 steps.
#
# MODEL= is the Hugging Face directory of the model (BF16 or the released FP8), PROMPTS= the files of prompts, REWARD=
# the functions that judge answers ("math format"); EVAL_PROMPTS= is held out, OUT= also writes the result as a Hugging
# Face model. The same command goes on from the last checkpoint in SAVE once there is one. docs/grpo.md, docs/rewards.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-64}
require_rewards
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/grpo-v3}

# Few rows are in an update: a schedule that takes any number of micro-batches, where none is asked for.
SCHEDULE=${SCHEDULE:-ZBVZeroBubble}
deepseek_v3_layout  # sets PARALLEL_ARGS by the number of GPUs

MODEL_ARGS=(--model "$MODEL" --mtp-num-layers 0)

TRAINING_ARGS=(
    --train-iters "${STEPS:-10400}"
    --lr 3e-6
    --bf16
    --seq-length "${SEQ_LENGTH:-36864}"          # of a row: a prompt of 4,096 tokens with the longest answer
    --micro-batch-size 1
    --kl k3
    --kl-beta 0.001
    --reference-refresh-interval 400
)

ROLLOUT_ARGS=(
    --grpo-prompts-per-step 32
    --grpo-group-size 16
    --max-completion-length "${MAX_COMPLETION:-32768}"  # 65,536 from step 8,200 on: SEQ_LENGTH=69632 with it
    --temperature 1
    --keep-routing                               # V3.2's report (arXiv 2512.02556, section 3.1)
    --rollout-tensor-parallel-size 8
)

reward_files "${TEMPLATE:-deepseek-r1}"  # sets DATA_ARGS and OUTPUT_ARGS

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" "$@"
