# Sourced by serve_vllm_slurm.sh and serve_vllm_pdsh.sh, which say how a command runs on every node: on_nodes VERB.
set -euo pipefail

EXAMPLES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCRIPT=$(basename "$0")
READY_SECONDS=${READY_SECONDS:-3600}
export NNODES=${NNODES:-4} PORT=${PORT:-8000}
FORWARDED=(MODEL PRECISION NNODES GPUS_PER_NODE TP PORT RPC_PORT SERVED_NAME MAX_MODEL_LEN VLLM VLLM_ARGS)

refuse() {
    echo "$SCRIPT: error: $*" >&2
    exit 2
}

[ "${BASH_SOURCE[0]}" != "$0" ] || refuse "this file is read by the scripts beside it; start one of those"
if [[ ${1:-} =~ ^(-h|--help)$ ]]; then
    for file in "$0" "$EXAMPLES/vllm_node.sh"; do
        sed -n '/^#!/d; /^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p' "$file"
    done
    exit 0
fi

# Prints the settings that are set as words for `env`, which brings them to other nodes.
forwarded() {
    local name
    for name in "${FORWARDED[@]}"; do
        [ -z "${!name:-}" ] || printf '%q ' "$name=${!name}"
    done
}

# Prints every node's command and starts nothing; settings are checked, and MODEL if it is here; nodes are not asked.
dry_run() {
    local rank line
    for ((rank = 0; rank < NNODES; rank++)); do
        line=$(bash "$EXAMPLES/vllm_node.sh" print "$rank" "$1") || exit 2
        echo "node $rank: $line"
    done
}

# Has every node look at itself, and refuses nodes that differ, before a GPU is taken.
check_nodes() {
    local lines count
    lines=$(on_nodes check) || refuse "a node cannot start; nothing was started"
    count=$(grep -c '^ok ' <<< "$lines" || true)
    [ "$count" -eq "$NNODES" ] || refuse "$count of $NNODES nodes answer"
    if [ "$(cut -d ' ' -f 3- <<< "$lines" | sort -u | wc -l)" -ne 1 ]; then
        echo "$lines" >&2
        refuse "the nodes differ in vLLM, GPUs or config.json; nothing was started"
    fi
    echo "$lines"
}

# Waits until http://$1 is ready; fails once process $2, which holds the servers, has ended.
wait_until_ready() {
    local end=$((SECONDS + READY_SECONDS))
    until curl -fsS -o /dev/null --max-time 5 "http://$1/health" 2> /dev/null; do
        kill -0 "$2" 2> /dev/null || { echo "$SCRIPT: the servers have ended before they were ready" >&2; return 1; }
        [ "$SECONDS" -lt "$end" ] || { echo "$SCRIPT: not ready after READY_SECONDS=$READY_SECONDS" >&2; return 1; }
        sleep "${POLL_SECONDS:-10}"
    done
}

# Asks one question and prints the answer.
curl_test() {
    local name=${SERVED_NAME:-$(basename "$MODEL")} question='[{"role": "user", "content": "1 + 1 = ?"}]'
    local body="{\"model\": \"$name\", \"messages\": $question, \"max_tokens\": 64}"
    echo "curl http://$1/v1/chat/completions -H 'Content-Type: application/json' -d '$body'"
    curl -fsS --max-time 600 "http://$1/v1/chat/completions" -H 'Content-Type: application/json' -d "$body" && echo
}

# Checks, starts, tests, and then holds the servers until they end; the first node is $1.
serve() {
    local servers status=0
    check_nodes
    on_nodes serve &
    servers=$!
    trap 'on_nodes stop > /dev/null 2>&1 || true' EXIT
    trap 'exit 143' TERM INT
    if ! { wait_until_ready "$1:$PORT" "$servers" && curl_test "$1:$PORT"; }; then
        exit 1
    fi
    echo "$SCRIPT: ready at http://$1:$PORT"
    wait "$servers" || status=$?
    exit "$status"
}
