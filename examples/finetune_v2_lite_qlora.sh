#!/bin/bash
# QLoRA of DeepSeek-V2-Lite (15.7B, 2.4B active), from one GPU with 40 GB on: weights as NF4, adapters of rank 16 beside
# every linear layer and every expert. GPUS_PER_NODE=1, 2, 4 or 8, and NNODES=2, 4, 8.
#
# What DeepSeek's page of V2-Lite has LLaMA-Factory do: rank and alpha 16, conversations cut at 4096 tokens, 2 of them
# at once on a GPU and 8 times for an update, a cosine over 5 epochs. MODEL= is the Hugging Face directory of the model
# (BF16), DATASET= the files of conversations, or weights and files; EVAL_DATASET= what is held out, OUT= also writes the
# adapter as PEFT's files. The same command goes on from the last checkpoint in SAVE once there is one. DATASET can be
# looked at before: ... --dry-run, and docs/finetuning.md; docs/lora.md has the rest.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-1}
NNODES=${NNODES:-1}
require_finetuning
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/finetune-v2-lite-qlora}

DATA_RANKS=$((NNODES * GPUS_PER_NODE))
case $DATA_RANKS in
    1|2|4|8|16|32|64) ;;
    *) no_layout 1 2 4 8 16 32 64 ;;
esac

PARALLEL_ARGS=(
    --expert-model-parallel-size "$((DATA_RANKS < 8 ? DATA_RANKS : 8))"
    --data-parallel-sharding-strategy optim_grads_params  # the bytes of one layer are gathered at a time
    --recompute-granularity full
)

rows_of_update $((16 * DATA_RANKS))  # sets BATCH

MODEL_ARGS=(--model "$MODEL")

LORA_ARGS=(
    --quantization-bit 4
    --lora-rank 16
    --lora-alpha 16
    --lora-target all
)

TRAINING_ARGS=(
    --epochs 5
    --lr 1e-4                                    # LLaMA-Factory's for LoRA, and AdamW as its Trainer has it
    --min-lr 0
    --lr-decay-style cosine
    --weight-decay 0
    --adam-beta2 0.999
    --bf16
    --seq-length 4096
    --overlong truncate
    --no-packing
    --micro-batch-size 2
    --global-batch-size "$BATCH"
)

ADAPTER=${OUT:-}
OUT='' finetuning_files deepseek-v2  # sets DATA_ARGS and OUTPUT_ARGS
[ -z "$ADAPTER" ] || OUTPUT_ARGS+=(--save-adapter "$ADAPTER")

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${LORA_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" "$@"
