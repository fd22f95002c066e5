#!/bin/bash
# DeepSeek-V3 (671B, 37B active) on NNODES=128 nodes of 8 GPUs or more: PP16, EP64, no tensor parallelism, as its report
# has it. On 64, 32 and 16 nodes the experts spread over as many GPUs as a stage has. What does not fit in 80 GB is moved
# to the hosts' memory or recomputed: docs/quickstart_cluster.md has the sums.
# The recipe is that of the DeepSeek-V3 report, section 4.2. At 10T tokens give --mtp-loss-scaling-factor 0.1 by hand.
#
# FP8=1 is the report's precision: FP8 GEMMs and moments in BF16 (docs/fp8.md). Without it: BF16 and float32 moments.
#
# The schedule is 1F1B, of which no weight gradient waits, so that 80 GB are enough. SCHEDULE=DualPipeV is the report's,
# for GPUs with more. The first batches of 3072 sequences are 48 micro-batches for each of the 64 data ranks, but from 512
# nodes on 12 or fewer, less than 1F1B's 16 stages: the schedule is ZBVZeroBubble there.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-128}
require DATA_PATH "the prefix of a .bin/.idx, or weights and prefixes"
require TOKENIZER "the tokenizer.json of DeepSeek-V3"
count NNODES
count GPUS_PER_NODE
SAVE=${SAVE:-runs/deepseek-v3}

MODEL_ARGS=(
    --model deepseek-v3
    --rope-type rope                     # the release's YaRN comes after pre-training
    --max-position-embeddings 4096
    --init-method-std 0.006
    --moe-router-bias-update-rate 0.001
    --moe-router-bias-update-samples 3491210937  # to 14.3T tokens, then the bias stays
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 0.0001
    --mtp-num-layers 1
    --mtp-loss-scaling-factor 0.3
)

deepseek_v3_layout  # sets PARALLEL_ARGS by the number of GPUs

TRAINING_ARGS=(
    --bf16
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size 15360
    --rampup-batch-size 3072 1536 114501952  # over 469B tokens
    --train-samples 3613281250           # 14.8T tokens
    --lr 2.2e-4
    --lr-decay-style deepseek-v3         # constant to 10T, cosine over 4.3T, 2.2e-5 for 333B, 7.3e-6 for 167B
    --min-lr 2.2e-5
    --lr-final 7.3e-6
    --lr-warmup-samples 6144000          # 2,000 batches of the first size
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
)

if [ "${FP8:-0}" = 1 ]; then
    TRAINING_ARGS+=(--fp8-format e4m3 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16)
fi

# Several prefixes with weights: DATA_PATH="0.7 /data/web 0.3 /data/code", hence without quotes.
DATA_ARGS=(--data-path $DATA_PATH --tokenizer-model "$TOKENIZER" --split 999,1,0)

OUTPUT_ARGS=(
    --save "$SAVE"
    --load "$SAVE"
    --save-interval 200
    --eval-interval 1000
    --eval-iters 2
    --tensorboard-dir "$SAVE/tensorboard"
    --distributed-timeout-minutes 30
)

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
