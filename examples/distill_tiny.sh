#!/bin/bash
# A dense student of 0.6 million parameters (Qwen2's form) learns from the DeepSeek-V3 that finetune_tiny.sh trains:
# `make distill` runs this twice, with TEACHER= a cache of its predictions (tools/cache_logits.py) and without, for labels
# alone. With NNODES= nodes, which share RUN_DIR, it tries out a cluster.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NNODES=${NNODES:-1}
count NNODES
GPUS_PER_NODE=${NPROC:-${GPUS_PER_NODE:-4}}  # processes; on a machine without GPUs they share the cores
CORES=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > GPUS_PER_NODE ? CORES / GPUS_PER_NODE : 1))}
EPOCHS=${EPOCHS:-12}
RUN_DIR=${RUN_DIR:-runs/tiny}

MODEL_ARGS=(
    --model deepseek-r1-distill-qwen-1.5b        # its form; what follows makes it small
    --num-layers 2
    --hidden-size 64
    --ffn-hidden-size 192
    --num-attention-heads 4
    --num-query-groups 2
    --kv-channels 16
    --vocab-size 8192
    --max-position-embeddings 256
    --tie-word-embeddings
)

case $GPUS_PER_NODE in
    1) MICRO_BATCH=8 PARALLEL_ARGS=() ;;
    2) MICRO_BATCH=8 PARALLEL_ARGS=() ;;
    4) MICRO_BATCH=4 PARALLEL_ARGS=(--tensor-model-parallel-size 2) ;;
    8) MICRO_BATCH=4 PARALLEL_ARGS=(--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2) ;;
    *) refuse "NPROC=$GPUS_PER_NODE is not one of 1, 2, 4, 8" ;;
esac

TRAINING_ARGS=(
    --epochs "$EPOCHS"
    --micro-batch-size "$MICRO_BATCH"
    --global-batch-size $((16 * NNODES))
    --seq-length 128
    --lr 1e-2
    --min-lr 0
    --lr-warmup-fraction 0.05
)

DATA_ARGS=(
    --dataset "${DATASET:-$RUN_DIR/distill/rows.jsonl}"
    --eval-dataset "${EVAL_DATASET:-$RUN_DIR/distill/held_out.jsonl}"
    --data-cache-path "$RUN_DIR/distill/tokens"
    --tokenizer-model "${TOKENIZER:-$RUN_DIR/data/tokenizer.json}"
    --template deepseek-v3
)

SAVE=$RUN_DIR/distill/alone
TEACHER_ARGS=()
if [ -n "${TEACHER:-}" ]; then
    SAVE=$RUN_DIR/distill/taught
    TEACHER_ARGS=(--teacher "$TEACHER" --kd-ratio 0.9)
fi

OUTPUT_ARGS=(
    --save "$SAVE"
    --save-interval 100
    --eval-interval 25
)

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TEACHER_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" "$@"
