#!/bin/bash
# Fine-tuning of the DeepSeek-V3 of 4.2 million parameters that pretrain_tiny.sh trains: `make finetune` runs this after
# making its conversations. With NNODES= nodes, which share RUN_DIR, it tries out a cluster. LORA=1 trains adapters.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NNODES=${NNODES:-1}
count NNODES
GPUS_PER_NODE=${NPROC:-${GPUS_PER_NODE:-4}}  # processes; on a machine without GPUs they share the cores
CORES=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > GPUS_PER_NODE ? CORES / GPUS_PER_NODE : 1))}
EPOCHS=${EPOCHS:-3}
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

TRAINING_ARGS=(
    --epochs "$EPOCHS"
    --micro-batch-size "$MICRO_BATCH"
    --global-batch-size $((16 * NNODES))
    --seq-length 128
    --lr 3e-3
    --min-lr 0
    --lr-warmup-fraction 0.05
)

DATA_ARGS=(
    --dataset "${DATASET:-$RUN_DIR/chats/train.jsonl}"
    --eval-dataset "${EVAL_DATASET:-$RUN_DIR/chats/held_out.jsonl}"
    --data-cache-path "$RUN_DIR/chats/cache"
    --tokenizer-model "${TOKENIZER:-$RUN_DIR/data/tokenizer.json}"
    --template deepseek-v3
)

SAVE=$RUN_DIR/finetuned
LORA_ARGS=()
if [ -n "${LORA:-}" ]; then
    SAVE=$RUN_DIR/finetuned_lora
    LORA_ARGS=(--lora-rank 16 --lora-target all router mtp --lora-plus-ratio 4)
fi

OUTPUT_ARGS=(
    --save "$SAVE"
    --load "$RUN_DIR/checkpoints"
    --save-interval 100
    --eval-interval 50
    --generate-every 1000000             # before the first step and after the last
    --generate-prompts 16
    --generate-tokens 32
)

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${LORA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" "$@"
