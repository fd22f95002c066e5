#!/bin/bash
# Reinforcement learning (GRPO) of the DeepSeek-V3 of 4.2 million parameters that finetune_tiny.sh fine-tuned, on its
# puzzles: `make grpo` runs this. With NNODES= nodes, which share RUN_DIR, it tries out a cluster.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NNODES=${NNODES:-1}
count NNODES
GPUS_PER_NODE=${NPROC:-${GPUS_PER_NODE:-2}}  # processes; on a machine without GPUs they share the cores
CORES=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > GPUS_PER_NODE ? CORES / GPUS_PER_NODE : 1))}
STEPS=${STEPS:-32}
SEED=${SEED:-1234}
RUN_DIR=${RUN_DIR:-runs/tiny}

MODEL_ARGS=(--model tiny --mtp-num-layers 0)

case $GPUS_PER_NODE in
    1) PARALLEL_ARGS=() ;;
    2|4|8) PARALLEL_ARGS=(--expert-model-parallel-size 2) ;;
    *) refuse "NPROC=$GPUS_PER_NODE is not one of 1, 2, 4, 8" ;;
esac

TRAINING_ARGS=(
    --train-iters "$STEPS"
    --micro-batch-size 8
    --seq-length 128
    --lr 1e-4
    --seed "$SEED"
    --moe-router-load-balancing-type none
)

ROLLOUT_ARGS=(
    --grpo-prompts-per-step 16
    --grpo-group-size 8
    --max-completion-length 32
    --keep-routing
    --reward exact
    --loss-aggregation token-mean
    --clip-high 0.28
)

DATA_ARGS=(
    --prompts "${PROMPTS:-$RUN_DIR/chats/train.jsonl}"
    --eval-prompts "${EVAL_PROMPTS:-$RUN_DIR/chats/held_out.jsonl}"
    --tokenizer-model "${TOKENIZER:-$RUN_DIR/data/tokenizer.json}"
    --template deepseek-v3
)

OUTPUT_ARGS=(
    --save "${SAVE:-$RUN_DIR/grpo}"
    --load "$RUN_DIR/finetuned"
    --eval-interval "$STEPS"             # before the first step and after the last
)

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" "$@"
