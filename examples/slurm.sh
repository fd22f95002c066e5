#!/bin/bash
#SBATCH --job-name=deepseek
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
# Starts one task on each node, which is torchrun's agent there:
#   DATA_PATH=... TOKENIZER=... sbatch --nodes=16 examples/slurm.sh examples/pretrain_deepseek_v2.sh [arguments]
#
# Five minutes before its time is over the job saves, ends, and puts itself back into the queue under its number; Slurm
# puts a preempted one back (--requeue). It continues from its last checkpoint: --save and --load of the scripts.
# With REQUEUE=0 it does not put itself back. A job that fails or has finished is not started again.
#
# SAVE_ARGS= are the arguments of saving, with those below as default; --async-save copies weights and moments to the
# host's memory (docs/checkpoints.md). DRY_RUN=1 checks and prints the command of each node and starts nothing; without
# sbatch, `NNODES=16 DRY_RUN=1 bash examples/slurm.sh examples/SCRIPT.sh` does so on any machine.
set -euo pipefail

refuse() {
    echo "slurm.sh: error: $*" >&2
    exit 2
}

[ $# -ge 1 ] || refuse "no script; usage: sbatch --nodes=N examples/slurm.sh examples/SCRIPT.sh [arguments]"
[ -f "$1" ] || refuse "no file $1 in $PWD; usage: sbatch --nodes=N examples/slurm.sh examples/SCRIPT.sh [arguments]"
if [ -z "${SLURM_JOB_ID:-}" ] && [ -z "${DRY_RUN:-}" ]; then
    refuse "this is no job; sbatch --nodes=N examples/slurm.sh $* submits one, DRY_RUN=1 NNODES=N bash examples/slurm.sh $* only checks it"
fi

export NNODES=${SLURM_NNODES:-${NNODES:-1}}
[ -z "${SLURM_GPUS_PER_NODE:-}" ] || export GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE##*:}}  # 8, or h100:8
given=("$@")
read -ra save_args <<< "${SAVE_ARGS---save-every-seconds 1800 --async-save}"
set -- "$1" "${save_args[@]}" "${@:2}"  # the user's come last and win

# Mistakes in the script's arguments are reported once, here, and not by every node.
checked=$(DRY_RUN=1 NODE_RANK=0 MASTER_ADDR=${MASTER_ADDR:-HOST_OF_NODE_0} bash "$@") || exit 2
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "$checked"
    exit 0
fi

export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=240  # torchrun's options
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

# `exec` throughout: Slurm signals the process that it started, which has to be torchrun's agent.
command=(srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' bash "$@")
printf '%q ' "${command[@]}"
echo
status=0
"${command[@]}" || status=$?

readonly TIME_IS_UP=138  # 128 + SIGUSR1: the agents' status after their ranks have saved and ended
if [ "$status" -eq "$TIME_IS_UP" ] && [ "${REQUEUE:-1}" = 1 ]; then
    echo "slurm.sh: job $SLURM_JOB_ID has saved and left before its time limit; it goes back into the queue, to go on"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "slurm.sh: Slurm does not requeue it; a new job is submitted, which begins after this one"
    sbatch --dependency="afterany:$SLURM_JOB_ID" --nodes="$SLURM_NNODES" --partition="$SLURM_JOB_PARTITION" \
        ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} \
        --time="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%l)" \
        "$(dirname "$1")/slurm.sh" "${given[@]}" && exit 0
    refuse "it could not be submitted; the same sbatch command goes on from the last checkpoint"
fi
exit "$status"
