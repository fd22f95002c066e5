#!/bin/bash
#SBATCH --job-name=deepseek-serve
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=serve-%j.out
# DeepSeek-V3 or R1, 671B, served by vLLM on the four nodes of a Slurm job:
#   MODEL=/models/DeepSeek-R1 sbatch examples/serve_vllm_slurm.sh
#   MODEL=/models/DeepSeek-R1-bf16 PRECISION=bf16 sbatch examples/serve_vllm_slurm.sh
# Every node is looked at before a server starts; once they are ready a question is asked, and the address printed.
# DRY_RUN=1 checks the settings, prints every node's command, and needs no job.
EXAMPLES=${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")}
[ -f "$EXAMPLES/vllm_common.sh" ] || EXAMPLES=${SLURM_SUBMIT_DIR:-.}/examples  # Slurm runs a copy of this file
source "$EXAMPLES/vllm_common.sh"

on_nodes() {
    srun --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --overlap \
        bash -c 'exec bash "$0" "$1" "$SLURM_NODEID" "$2"' "$EXAMPLES/vllm_node.sh" "$1" "$HEAD"
}

if [ -n "${DRY_RUN:-}" ]; then
    dry_run "${HEAD:-HOST_OF_NODE_0}"
    exit
fi
[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is no job; sbatch $0 submits one, DRY_RUN=1 bash $0 only checks"
[ "${SLURM_NNODES:-1}" -eq "$NNODES" ] || refuse "the job has ${SLURM_NNODES:-1} nodes, not NNODES=$NNODES"
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # head would break the pipe
serve "$HEAD"
