#!/bin/bash
# Fine-tuning of a dense student, DeepSeek-R1-Distill-Qwen (1.5B to 14B) or -Llama-8B, on reasoning: on one node of 8 GPUs with 80 GB,
# or NNODES=2, 4, ... 64. The 32B model needs 2 nodes, Llama-70B 8. 128 rows of 32,768 tokens and the rates of R1's own
# fine-tuning (appendix B.4.2): cosine from 5e-5 to 5e-6. Four GPUs share each matrix, the layers are in a pipeline.
#
# MODEL= is the Hugging Face directory of the model (BF16), DATASET= the files of conversations, or weights and files;
# EVAL_DATASET= what is held out, OUT= also writes the result as a Hugging Face model. The same command goes on from the
# last checkpoint in SAVE once there is one. DATASET can be looked at before: ... --dry-run, and docs/finetuning.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
require_finetuning
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/finetune-r1-distill-qwen}

case $((NNODES * GPUS_PER_NODE)) in
    8) STAGES=2 ;;
    16|32|64|128|256|512) STAGES=4 ;;
    *) no_layout 8 16 32 64 128 256 512 ;;
esac

PARALLEL_ARGS=(
    --tensor-model-parallel-size 4               # heads of keys and values are fewer in the 1.5B model: ranks share them
    --sequence-parallel
    --pipeline-model-parallel-size "$STAGES"
    --recompute-granularity full
)
DATA_RANKS=$((NNODES * GPUS_PER_NODE / 4 / STAGES))

rows_of_update 128  # sets BATCH

MODEL_ARGS=(--model "$MODEL")

TRAINING_ARGS=(
    --recipe deepseek-r1
    --bf16
    --seq-length 32768
    --micro-batch-size 1
    --global-batch-size "$BATCH"
)

finetuning_files "${TEMPLATE:-deepseek-r1}"  # sets DATA_ARGS and OUTPUT_ARGS

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
