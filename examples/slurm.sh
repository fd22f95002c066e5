#!/bin/bash
#SBATCH --job-name=deepseek
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=slurm-%j.out
#SBATCH --signal=USR1@300
# One task a node, each of which is torchrun's agent there:
#   DATA_PATH=... TOKENIZER=... sbatch --nodes=16 examples/slurm.sh examples/pretrain_deepseek_v2.sh [arguments]
# DRY_RUN=1 prints the command of each node and starts nothing. Five minutes before its time is over the job saves and
# leaves (docs/checkpoints.md); with --save and --load in one directory the same command goes on.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: sbatch --nodes=N examples/slurm.sh examples/SCRIPT.sh [arguments]" >&2; exit 2; }

export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=240  # torchrun's options
export NNODES=$SLURM_NNODES
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

command=(srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' bash "$@")
printf '%q ' "${command[@]}"
echo
"${command[@]}"
