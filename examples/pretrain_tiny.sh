#!/bin/bash
# A DeepSeek-V3 of 4.2 million parameters on CPU or GPU: `make pretrain` runs this after making its data. With NNODES=
# nodes, which share RUN_DIR, it tries out a cluster: every node adds 16 sequences to the batch.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NNODES=${NNODES:-1}
count NNODES
GPUS_PER_NODE=${NPROC:-${GPUS_PER_NODE:-4}}  # processes; on a machine without GPUs they share the cores
CORES=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > GPUS_PER_NODE ? CORES / GPUS_PER_NODE : 1))}
STEPS=${STEPS:-120}
RUN_DIR=${RUN_DIR:-runs/tiny}

MODEL_ARGS=(--model tiny)

case $GPUS_PER_NODE in
    1) MICRO_BATCH=8 PARALLEL_ARGS=() ;;
    2) MICRO_BATCH=8 PARALLEL_ARGS=(--expert-model-parallel-size 2) ;;
    4) MICRO_BATCH=4 PARALLEL_ARGS=(--pipeline-model-parallel-size 2 --expert-model-parallel-size 2) ;;
    8) MICRO_BATCH=4 PARALLEL_ARGS=(--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel
                      --expert-model-parallel-size 2) ;;
    *) refuse "NPROC=$GPUS_PER_NODE is not one of 1, 2, 4, 8" ;;
esac

# The learning rate is 27 times V3's, so that 120 steps are enough, and with it the scores of the experts move faster
# than V3's update rate of 0.001 follows: most tokens would go to the same few experts until the end.
TRAINING_ARGS=(
    --train-iters "$STEPS"
    --micro-batch-size "$MICRO_BATCH"
    --global-batch-size $((16 * NNODES))
    --seq-length 256
    --lr 6e-3
    --min-lr 0
    --lr-decay-style linear
    --lr-warmup-fraction 0.05
    --moe-router-bias-update-rate 0.01
)

DATA_ARGS=(
    --data-path "${DATA_PATH:-$RUN_DIR/data/corpus_text_document}"
    --data-cache-path "$RUN_DIR/data/cache"
    --tokenizer-model "${TOKENIZER:-$RUN_DIR/data/tokenizer.json}"
    --split 95,5,0
)

OUTPUT_ARGS=(
    --save "$RUN_DIR/checkpoints"
    --load "$RUN_DIR/checkpoints"
    --save-interval 60
    --eval-interval 30
    --eval-iters 4
)

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
