# Sourced by the scripts beside it: starts pretrain_deepseek.py, for fine-tuning finetune_deepseek.py, or of grpo_*.sh
# train_grpo.py, on this node by tools/launch.py, which is torchrun with the arguments checked first.
#
# One node:    GPUS_PER_NODE=8 bash examples/SCRIPT.sh
# Many nodes:  on each, MASTER_ADDR=host0 NNODES=16 NODE_RANK=0..15 bash examples/SCRIPT.sh
# Slurm:       sbatch --nodes=16 examples/slurm.sh examples/SCRIPT.sh
# pdsh:        HOSTS='node[0-15]' bash examples/pdsh.sh examples/SCRIPT.sh
# LOG_DIR= keeps what each rank prints in LOG_DIR/node-N/*/attempt_N/RANK/std*.log, besides showing it.
# DRY_RUN=1 checks the arguments as all ranks of all nodes would, prints the command and starts nothing.
# PYTHON= is the interpreter: without it that of the active virtual environment, else .venv, else python3 on the PATH.
# Arguments after the script's name are passed on and win over the script's.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case $(basename "$0") in
    finetune_*|dpo_*|distill_*) ENTRY=finetune_deepseek.py ;;
    grpo_*) ENTRY=train_grpo.py ;;
    *) ENTRY=pretrain_deepseek.py ;;
esac

refuse() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

[ "${BASH_SOURCE[0]}" != "$0" ] || refuse "this file is read by the scripts beside it; start one of those"

# Prints the comments at the top of a file.
about() {
    sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$1"
}

if [[ ${1:-} =~ ^(-h|--help)$ ]]; then
    about "$0"
    about "${BASH_SOURCE[0]}" | sed 1,2d
    echo "The arguments: python tools/launch.py $ENTRY --help"
    exit 0
fi

# require NAME WHAT: refuses, with a line that says what it is, if the user has not set the variable NAME.
require() {
    [ -n "${!1:-}" ] || refuse "$1 is not set: $2"
}

# count NAME: refuses a variable NAME that is not a number of nodes, ranks or GPUs.
count() {
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || refuse "$1=${!1} is not a whole number of at least 1"
}

# no_layout RANKS...: refuses this number of GPUs, for which the script has no layout, and names those that have one.
no_layout() {
    local ranks nodes=()
    for ranks in "$@"; do
        [ $((ranks % GPUS_PER_NODE)) -ne 0 ] || nodes+=($((ranks / GPUS_PER_NODE)))
    done
    refuse "NNODES=$NNODES of GPUS_PER_NODE=$GPUS_PER_NODE has no layout here; NNODES that have:" \
        "${nodes[*]:-none with so many GPUs}"
}

# Sets PARALLEL_ARGS for DeepSeek-V3's architecture on GPUs of 80 GB: PP16, and EP64 or as many GPUs as a stage has.
# Every size of V3's batch ramp divides among the data ranks: a sixteenth of the GPUs, which divides 1536.
# docs/quickstart_cluster.md has the memory; RECOMPUTE=selective, as in the report, is for GPUs with more.
deepseek_v3_layout() {
    local ep schedule=1F1B offload=()
    case $((NNODES * GPUS_PER_NODE)) in
        128) ep=8 offload=(--optimizer-cpu-offload) ;;
        256) ep=16 offload=(--optimizer-cpu-offload) ;;
        512) ep=32 ;;
        1024) ep=64 ;;
        2048|3072) ep=64 ;;
        4096|6144|8192|12288|24576) ep=64 schedule=ZBVZeroBubble ;;
        *) no_layout 128 256 512 1024 2048 3072 4096 6144 8192 12288 24576 ;;
    esac
    PARALLEL_ARGS=(--pipeline-model-parallel-size 16 --pipeline-schedule "${SCHEDULE:-$schedule}"
                   --expert-model-parallel-size "$ep" "${offload[@]}" --recompute-granularity "${RECOMPUTE:-full}")
}

# Refuses a fine-tuning that is told no model or no conversations.
require_finetuning() {
    require MODEL "the Hugging Face directory of the model: config.json, tokenizer.json and the safetensors files"
    require DATASET "files of conversations, or weights and files"
}

# rows_of_update ROWS: rounds BATCH= rows in an update (ROWS without it) up, so that each data rank gets as many.
rows_of_update() {
    BATCH=${BATCH:-$1}
    count BATCH
    BATCH=$(((BATCH + DATA_RANKS - 1) / DATA_RANKS * DATA_RANKS))
}

# finetuning_files TEMPLATE: sets DATA_ARGS and OUTPUT_ARGS. Several files have weights before them,
# DATASET="0.7 chats.jsonl 0.3 code.jsonl", hence without quotes.
finetuning_files() {
    DATA_ARGS=(--dataset $DATASET --tokenizer-model "${TOKENIZER:-$MODEL}" --template "$1" --num-workers 16)
    [ -z "${EVAL_DATASET:-}" ] || DATA_ARGS+=(--eval-dataset $EVAL_DATASET --eval-interval 50)
    OUTPUT_ARGS=(--save "$SAVE" --load "$MODEL" --save-interval 100 --keep-last 2 --distributed-timeout-minutes 60)
    [ -z "${OUT:-}" ] || OUTPUT_ARGS+=(--save-hf "$OUT")
}

# Refuses a reinforcement learning that is told no model, prompts or rewards.
require_rewards() {
    require MODEL "the Hugging Face directory of the model: config.json, tokenizer.json and the safetensors files"
    require PROMPTS "files of prompts"
    require REWARD "functions that judge answers, as in docs/rewards.md"
}

# reward_files TEMPLATE: sets DATA_ARGS and OUTPUT_ARGS. REWARD may name several, PROMPTS several files, hence without
# quotes.
reward_files() {
    local reward
    DATA_ARGS=(--prompts $PROMPTS --tokenizer-model "${TOKENIZER:-$MODEL}" --template "$1")
    for reward in $REWARD; do DATA_ARGS+=(--reward "$reward"); done
    [ -z "${EVAL_PROMPTS:-}" ] || DATA_ARGS+=(--eval-prompts $EVAL_PROMPTS --eval-interval 50)
    OUTPUT_ARGS=(--save "$SAVE" --load "$MODEL" --save-interval 50 --keep-last 2 --distributed-timeout-minutes 120)
    [ -z "${OUT:-}" ] || OUTPUT_ARGS+=(--save-hf "$OUT")
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" || refuse "PYTHON=$PYTHON is no program"
    elif [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        echo "$VIRTUAL_ENV/bin/python"
    elif [ -x "$REPOSITORY/.venv/bin/python" ]; then
        echo "$REPOSITORY/.venv/bin/python"
    else
        command -v python3 || refuse "no Python: make venv in $REPOSITORY makes .venv, or set PYTHON="
    fi
}

# Prints lines on data that this machine does not see. It is no error, as DRY_RUN=1 may run where the data is not.
tell_absent() {
    local word
    for word in ${DATA_PATH:-}; do
        [[ $word =~ ^[0-9.]+$ ]] || [ -e "$word.idx" ] || echo "note: not on this machine: $word.idx of DATA_PATH" >&2
    done
    for word in ${DATASET:-} ${EVAL_DATASET:-}; do
        [[ $word =~ ^[0-9.]+$ ]] || [ -e "$word" ] || echo "note: not on this machine: $word of DATASET" >&2
    done
    for word in ${PROMPTS:-} ${EVAL_PROMPTS:-}; do
        [ -e "$word" ] || echo "note: not on this machine: $word of PROMPTS" >&2
    done
    [ -z "${TOKENIZER:-}" ] || [ -e "$TOKENIZER" ] || echo "note: not on this machine: TOKENIZER $TOKENIZER" >&2
}

launch() {
    local python rendezvous=(--standalone)
    python=$(find_python) || exit 2
    if [ "${NNODES:-1}" -gt 1 ]; then
        if [ -n "${DRY_RUN:-}" ]; then
            NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-HOST_OF_NODE_0}
        fi
        require NODE_RANK "on each of the $NNODES nodes its number, from 0; Slurm: sbatch --nodes=$NNODES examples/slurm.sh $0"
        require MASTER_ADDR "the host of node 0, on every node"
        rendezvous=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
                    --master_port "${MASTER_PORT:-29500}")
    fi
    local logs=()
    [ -z "${LOG_DIR:-}" ] || logs=(--log-dir "$LOG_DIR/node-${NODE_RANK:-0}" --tee 3)
    local arguments=(--nproc_per_node "$GPUS_PER_NODE" "${rendezvous[@]}" "${logs[@]}" "$REPOSITORY/$ENTRY" "$@")
    if [ -n "${DRY_RUN:-}" ]; then
        tell_absent
        "$python" "$REPOSITORY/tools/launch.py" --dry-run "${arguments[@]}" > /dev/null
    fi
    printf '%q ' "$python" "$REPOSITORY/tools/launch.py" "${arguments[@]}"
    echo
    [ -n "${DRY_RUN:-}" ] || exec "$python" "$REPOSITORY/tools/launch.py" "${arguments[@]}"
}
