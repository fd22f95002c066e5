#!/bin/bash
# DeepSeek-V3 made small (3 layers, hidden 2048, 16 experts; 1.3B), the single-node exercise of MindFormers, on WikiText-2
# and one node of 8 GPUs: DP2, TP2, PP2, EP2, and 20 steps of warm-up to a constant learning rate. Its data:
#   python tools/preprocess_data.py --input wiki.train.tokens --split-wikitext section --seq-length 4096 --append-bos \
#       --tokenizer-model tokenizer.json --output-prefix wiki_4096
# and DATA_PATH=wiki_4096_text_document TOKENIZER=tokenizer.json. MindFormers goes twice over 1,000 samples: STEPS=250.
#
# SMALL=1 is the same in a hundredth of the size, for a machine without GPUs: a tokenizer of up to 8192 ids, texts of 256.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
require DATA_PATH "the prefix of a .bin/.idx, or weights and prefixes"
require TOKENIZER "the tokenizer.json of DeepSeek-V3"
count NNODES
count GPUS_PER_NODE
[ $((NNODES * GPUS_PER_NODE)) -eq 8 ] || no_layout 8
SAVE=${SAVE:-runs/v3-1b}
STEPS=${STEPS:-250}

MODEL_ARGS=(
    --model deepseek-v3
    --num-layers 3
    --moe-layer-freq "([0]*1+[1]*2)"
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 8
    --num-experts 16
    --rope-type rope
    --max-position-embeddings 4096
    --init-method-std 0.02
    --moe-router-bias-update-rate 0.0001
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 0.001
    --mtp-num-layers 1
    --mtp-loss-scaling-factor 0.3
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 2
    --sequence-parallel
    --pipeline-model-parallel-size 2
    --expert-model-parallel-size 2
)

TRAINING_ARGS=(
    --bf16
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size 8                # 4 micro-batches for each of 2 data ranks
    --train-iters "$STEPS"
    --lr 2.2e-4
    --lr-decay-style constant
    --lr-warmup-iters 20
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.0
    --clip-grad 1.0
)

if [ "${SMALL:-0}" = 1 ]; then
    MODEL_ARGS+=(--vocab-size 8192 --hidden-size 256 --ffn-hidden-size 768 --moe-ffn-hidden-size 192 --q-lora-rank 192
                 --moe-shared-expert-intermediate-size 192 --kv-lora-rank 64 --qk-head-dim 16 --qk-pos-emb-head-dim 8
                 --v-head-dim 16)
    TRAINING_ARGS+=(--seq-length 256)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

# Several prefixes with weights: DATA_PATH="0.7 /data/web 0.3 /data/code", hence without quotes.
DATA_ARGS=(--data-path $DATA_PATH --tokenizer-model "$TOKENIZER" --split 1,0,0)

OUTPUT_ARGS=(--save "$SAVE" --load "$SAVE" --save-interval 1000)

launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
