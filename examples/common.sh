# Sourced by the scripts beside it: starts pretrain_deepseek.py by torchrun on this node.
#
# One node:    GPUS_PER_NODE=8 bash examples/SCRIPT.sh
# Many nodes:  on each, MASTER_ADDR=host0 NNODES=16 NODE_RANK=0..15 bash examples/SCRIPT.sh
# Slurm:       sbatch --nodes=16 examples/slurm.sh examples/SCRIPT.sh
# DRY_RUN=1 only prints the command. Arguments after the script's name are passed on and win over the script's.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

launch() {
    local rendezvous=(--standalone)
    if [ "${NNODES:-1}" -gt 1 ]; then
        rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?is not set}"
                    --master_addr "${MASTER_ADDR:?is not set}" --master_port "${MASTER_PORT:-29500}")
    fi
    local command=(torchrun --nproc_per_node "$GPUS_PER_NODE" "${rendezvous[@]}"
                   "$REPOSITORY/pretrain_deepseek.py" "$@")
    printf '%q ' "${command[@]}"
    echo
    [ -n "${DRY_RUN:-}" ] || exec "${command[@]}"
}
