#!/bin/bash
# Starts a script beside it on many nodes over ssh, from one machine: pdsh starts an agent of torchrun on each.
#   HOSTS='node[0-15]' DATA_PATH=... TOKENIZER=... bash examples/pdsh.sh examples/pretrain_deepseek_v3.sh [arguments]
# HOSTS= is a list as pdsh takes it, or HOSTFILE= a file with a host in each line, of which only the first word counts
# (`node0 slots=8`). The first host is node 0, whose store the others find; MASTER_ADDR= is its address in another network.
#
# All nodes need this folder under the same path, ssh without a password from here, and the same environment to run in.
# The variables that the scripts read go along, as do those of NCCL, gloo and torch; EXPORT="A B" names more.
#
# What each rank prints is in LOG_DIR/node-N/*/attempt_N/RANK/std*.log (logs/DATE without LOG_DIR=), and here with the
# host before it. Ctrl-C ends it on all nodes, where ranks save first. The status is the largest of all nodes. DRY_RUN=1
# checks the arguments, prints the command of each node and starts nothing.
set -euo pipefail

refuse() {
    echo "pdsh.sh: error: $*" >&2
    exit 2
}

# A node's side: ssh hangs up where this machine's side is ended, and the agent is told to end as Slurm would tell it.
if [ "${1:-}" = --node ]; then
    setsid bash "${@:2}" &  # in a session of its own, so that the hang-up itself does not reach it
    agent=$!
    trap 'kill -TERM "$agent" 2> /dev/null || true' HUP INT TERM
    status=0
    wait "$agent" || status=$?
    while kill -0 "$agent" 2> /dev/null; do  # the wait was ended by a signal
        status=0
        wait "$agent" || status=$?
    done
    exit "$status"
fi

usage="usage: HOSTS='node[0-15]' bash examples/pdsh.sh examples/SCRIPT.sh [arguments]"
if [[ ${1:-} =~ ^(-h|--help)$ ]]; then
    sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"
    exit 0
fi
[ $# -ge 1 ] || refuse "no script; $usage"
[ -f "$1" ] || refuse "no file $1 in $PWD; $usage"

# Prints the hosts in their order, a line each.
hosts() {
    if [ -n "${HOSTFILE:-}" ]; then
        [ -z "${HOSTS:-}" ] || refuse "HOSTS= and HOSTFILE=: give one"
        [ -f "$HOSTFILE" ] || refuse "no file $HOSTFILE, which HOSTFILE names"
        sed 's/#.*//' "$HOSTFILE" | awk 'NF {print $1}'
    elif [ -z "${HOSTS:-}" ]; then
        refuse "HOSTS is not set: the nodes, as in HOSTS='node[0-15]', or HOSTFILE= a file with their names"
    elif [[ $HOSTS == *"["* ]]; then
        command -v pdsh > /dev/null || refuse "pdsh is needed for HOSTS=$HOSTS; HOSTS=node0,node1 names each host"
        pdsh -N -R exec -f 1 -w "$HOSTS" echo %h
    else
        tr -s ', ' '\n' <<< "$HOSTS" | sed '/^$/d'
    fi
}

found=$(hosts) || exit 2
mapfile -t nodes <<< "$found"
[ -n "$found" ] || refuse "HOSTFILE=$HOSTFILE names no host"
repeated=$(sort <<< "$found" | uniq -d | head -n 1)
[ -z "$repeated" ] || refuse "the host $repeated is named twice; a node has one agent for all its GPUs"
export NNODES=${#nodes[@]} MASTER_ADDR=${MASTER_ADDR:-${nodes[0]}} MASTER_PORT=${MASTER_PORT:-29500}
export LOG_DIR=${LOG_DIR:-logs/$(date +%Y%m%d-%H%M%S)}

# Mistakes in the script's arguments are reported once, here, and not by every node.
checked=$(DRY_RUN=1 NODE_RANK=0 bash "$@") || exit 2

names=(NNODES MASTER_ADDR MASTER_PORT LOG_DIR)
for name in GPUS_PER_NODE NPROC PYTHON VIRTUAL_ENV DATA_PATH TOKENIZER MODEL DATASET EVAL_DATASET SAVE OUT RUN_DIR STEPS \
    TEACHER PROMPTS EVAL_PROMPTS REWARD RATIO MAX_COMPLETION SEQ_LENGTH SEED \
    OBJECTIVE BETA BATCH SCHEDULE RECOMPUTE RECIPE FP8 LORA EPOCHS TEMPLATE SMALL LD_LIBRARY_PATH ${EXPORT:-} \
    $(compgen -e | grep -E '^(NCCL|GLOO|TORCH|PET|CUDA|OMP|HF|WANDB)_' || true); do
    [ -z "${!name:-}" ] || names+=("$name")
done
given=""
for name in "${names[@]}"; do
    given+=$(printf ' %q' "$name=${!name}")
done
given+=$(printf ' %q' bash "$(dirname "$1")/pdsh.sh" --node "$@")
folder=$(printf '%q' "$PWD")
remote="cd ${folder//%/%%} && env NODE_RANK=%n${given//%/%%}"  # of %% pdsh makes a %

command=(pdsh -S -b -f "$NNODES" -R exec -w "$(IFS=,; echo "${nodes[*]}")"
         ssh -tt -o BatchMode=yes -o LogLevel=ERROR %h "$remote")
printf '%q ' "${command[@]}"
echo
if [ -n "${DRY_RUN:-}" ]; then
    tail -n 1 <<< "$checked"
    exit 0
fi
command -v pdsh > /dev/null || refuse "pdsh is not installed"
exec "${command[@]}"
