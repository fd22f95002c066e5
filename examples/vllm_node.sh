# A node of DeepSeek-V3 or R1 (671 billion parameters) under vLLM: serve_vllm_slurm.sh and serve_vllm_pdsh.sh start it.
#   bash vllm_node.sh check RANK HEAD    looks at what a start needs and prints one line; takes no GPU
#   bash vllm_node.sh serve RANK HEAD    starts this node's vllm
#   bash vllm_node.sh stop               ends it
#   bash vllm_node.sh print RANK HEAD    prints what serve would start
#
# MODEL= is the Hugging Face directory, the same on every node, PRECISION= fp8 (as released) or bf16 (what
# tools/convert_checkpoint.py --dtype bf16 writes). Attention is split over the TP=8 GPUs of a node, every node has
# requests of its own, and experts lie on all GPUs: of each of 32 GPUs weights take about 25 GB in FP8, 45 GB in BF16.
# Also: NNODES=4 GPUS_PER_NODE=8 PORT=8000 RPC_PORT=13345 SERVED_NAME= MAX_MODEL_LEN=32768 VLLM=vllm VLLM_ARGS=
set -euo pipefail

MODEL=${MODEL:-} PRECISION=${PRECISION:-fp8}
NNODES=${NNODES:-4} GPUS_PER_NODE=${GPUS_PER_NODE:-8} TP=${TP:-${GPUS_PER_NODE:-8}}
PORT=${PORT:-8000} RPC_PORT=${RPC_PORT:-13345} MAX_MODEL_LEN=${MAX_MODEL_LEN:-32768} VLLM=${VLLM:-vllm}
SERVED_NAME=${SERVED_NAME:-$(basename "$MODEL")}
PID_FILE=${TMPDIR:-/tmp}/vllm-$PORT.pid

refuse() {
    echo "vllm_node.sh: error: ${HOSTNAME%%.*}: $*" >&2
    exit 2
}

# Refuses settings that no node could start with; needs nothing but bash.
check_settings() {
    local name
    [ -n "$MODEL" ] || refuse "MODEL is not set: the Hugging Face directory, the same on every node"
    for name in NNODES GPUS_PER_NODE TP PORT RPC_PORT MAX_MODEL_LEN; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || refuse "$name=${!name} is not a whole number of at least 1"
    done
    [[ $PRECISION =~ ^(fp8|bf16)$ ]] || refuse "PRECISION=$PRECISION is neither fp8 nor bf16"
    [ $((GPUS_PER_NODE % TP)) -eq 0 ] || refuse "TP=$TP does not divide GPUS_PER_NODE=$GPUS_PER_NODE"
    [ "$PORT" -ne "$RPC_PORT" ] || refuse "PORT and RPC_PORT are both $PORT"
}

# Refuses files that are not there, or not what PRECISION says.
check_model() {
    local shard missing=0 config=$MODEL/config.json index=$MODEL/model.safetensors.index.json
    [ -d "$MODEL" ] || refuse "MODEL=$MODEL is no directory here"
    for shard in "$config" "$MODEL/tokenizer.json" "$index"; do
        [ -s "$shard" ] || refuse "there is no $shard"
    done
    grep -q '"model_type": *"deepseek_v3"' "$config" || refuse "$config is not of model_type deepseek_v3"
    if grep -q '"quantization_config": *{' "$config"; then
        [ "$PRECISION" = fp8 ] || refuse "$MODEL is FP8: PRECISION=fp8, or convert it by tools/convert_checkpoint.py"
    else
        [ "$PRECISION" = bf16 ] || refuse "$MODEL is not quantised: PRECISION=bf16"
    fi
    while read -r shard; do
        [ -s "$MODEL/$shard" ] || missing=$((missing + 1))
    done < <(grep -o '"[^"]*\.safetensors"' "$index" | tr -d '"' | sort -u)
    [ "$missing" -eq 0 ] || refuse "$missing files that $index names are missing or empty"
}

# Refuses a port of this node at which somebody listens.
check_port() {
    if (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; then
        refuse "port $1 is taken; $2= chooses another"
    fi
}

# The node's line of the check: what has to be the same everywhere comes after the host.
check() {
    local version gpus busy
    check_settings
    check_model
    command -v "$VLLM" > /dev/null || refuse "VLLM=$VLLM is no program on the PATH"
    version=$("$VLLM" --version 2> /dev/null | tail -n 1) || refuse "$VLLM --version fails"
    gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader) || refuse "nvidia-smi fails"
    [ "$(wc -l <<< "$gpus")" -ge "$GPUS_PER_NODE" ] ||
        refuse "$(wc -l <<< "$gpus") GPUs, not GPUS_PER_NODE=$GPUS_PER_NODE"
    busy=$(nvidia-smi --query-compute-apps=pid --format=csv,noheader | wc -l)
    [ "$busy" -eq 0 ] || refuse "$busy processes are on its GPUs"
    getent hosts "$2" > /dev/null || refuse "the first node, $2, is not known here"
    if [ "$1" -eq 0 ]; then
        check_port "$PORT" PORT
        check_port "$RPC_PORT" RPC_PORT
    elif command -v ping > /dev/null; then
        ping -c 1 -W 5 "$2" > /dev/null || refuse "the first node, $2, does not answer a ping"
    fi
    gpus=$(sort -u <<< "$gpus" | paste -s -d +)
    echo "ok ${HOSTNAME%%.*} vllm $version, $gpus, config $(cksum < "$MODEL/config.json" | cut -d ' ' -f 1)"
}

# Sets COMMAND for node $1 with the first node $2: data-parallel attention, experts over all GPUs.
set_command() {
    local local_size=$((GPUS_PER_NODE / TP)) more=()
    [ -z "${VLLM_ARGS:-}" ] || read -ra more <<< "$VLLM_ARGS"
    COMMAND=("$VLLM" serve "$MODEL" --served-model-name "$SERVED_NAME" --dtype bfloat16 --max-model-len "$MAX_MODEL_LEN"
             --tensor-parallel-size "$TP" --enable-expert-parallel
             --data-parallel-size $((NNODES * local_size)) --data-parallel-size-local "$local_size"
             --data-parallel-address "$2" --data-parallel-rpc-port "$RPC_PORT")
    if [ "$1" -eq 0 ]; then
        COMMAND+=(--host 0.0.0.0 --port "$PORT" "${more[@]}")
    else
        COMMAND+=(--headless --data-parallel-start-rank $(($1 * local_size)) "${more[@]}")
    fi
}

case ${1:-} in
    check) check "$2" "$3" ;;
    print)
        check_settings
        if [ -d "$MODEL" ]; then
            check_model
        elif [ "$2" -eq 0 ]; then
            echo "note: not on this machine: MODEL $MODEL" >&2
        fi
        set_command "$2" "$3"
        printf '%q ' "${COMMAND[@]}"
        echo ;;
    serve)
        check_settings
        set_command "$2" "$3"
        echo $$ > "$PID_FILE"
        exec "${COMMAND[@]}" ;;
    stop) [ ! -f "$PID_FILE" ] || { kill "$(cat "$PID_FILE")" 2> /dev/null || true; rm -f "$PID_FILE"; } ;;
    *) refuse "usage: vllm_node.sh check|serve|print RANK HEAD, or stop" ;;
esac
