#!/bin/bash
# DeepSeek-V2-Lite (15.7B, 2.4B active) on one node of 8 GPUs with 80 GB, or NNODES=2, 4, ... 64: experts over 8 GPUs,
# everything sharded. The recipe is that of the DeepSeek-V2 report, appendix B (5.7T tokens), with batches of 512
# sequences in place of its 4608.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
require DATA_PATH "the prefix of a .bin/.idx, or weights and prefixes"
require TOKENIZER "the tokenizer.json of DeepSeek-V2"
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/deepseek-v2-lite}

MODEL_ARGS=(
    --model deepseek-v2-lite
    --rope-type rope                     # the release's YaRN comes after pre-training
    --max-position-embeddings 4096
    --init-method-std 0.006
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 0.001
)

case $((NNODES * GPUS_PER_NODE)) in
    8|16|32|64|128|256|512) ;;  # numbers of GPUs that divide the batch
    *) no_layout 8 16 32 64 128 256 512 ;;
esac

PARALLEL_ARGS=(
    --expert-model-parallel-size 8
    --data-parallel-sharding-strategy optim_grads_params
    --recompute-granularity selective
    --recompute-modules layernorm mla_up_proj moe_act
)

TRAINING_ARGS=(
    --bf16
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size 512
    --train-samples 1391601562           # 5.7T tokens
    --lr 4.2e-4
    --lr-decay-style cosine              # the report's falls in two steps, at 80 % and 90 %
    --min-lr 4.2e-5
    --lr-warmup-samples 1024000          # 2,000 batches
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
)

# Several prefixes with weights: DATA_PATH="0.7 /data/web 0.3 /data/code", hence without quotes.
DATA_ARGS=(--data-path $DATA_PATH --tokenizer-model "$TOKENIZER" --split 999,1,0)

OUTPUT_ARGS=(
    --save "$SAVE"
    --load "$SAVE"
    --save-interval 500
    --eval-interval 500
    --eval-iters 10
    --tensorboard-dir "$SAVE/tensorboard"
)

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
