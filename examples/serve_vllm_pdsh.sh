#!/bin/bash
# DeepSeek-V3 or R1, 671B, served by vLLM on four nodes that pdsh reaches, started from any machine:
#   NODES=node[0-3] MODEL=/models/DeepSeek-R1 bash examples/serve_vllm_pdsh.sh
#   NODES=node[0-3] MODEL=/models/DeepSeek-R1-bf16 PRECISION=bf16 bash examples/serve_vllm_pdsh.sh
# This folder and MODEL must be at the same paths on the nodes, which are looked at before a server starts; once the
# servers are ready a question is asked, and the address printed. Ctrl-C ends the servers.
# DRY_RUN=1 checks the settings and prints every node's command; no node is asked.
source "$(dirname "${BASH_SOURCE[0]}")/vllm_common.sh"

# pdsh puts a node's name for %h and its number for %n; -S: a node's failure is its own.
on_nodes() {
    pdsh -S -N -R exec -w "$NODES" ssh -o BatchMode=yes -o ConnectTimeout=10 %h \
        "env $(forwarded) bash $(printf '%q' "$EXAMPLES/vllm_node.sh") $1 %n $HEAD"
}

if [ -n "${DRY_RUN:-}" ]; then
    dry_run "${HEAD:-HOST_OF_NODE_0}"
    exit
fi
[ -n "${NODES:-}" ] || refuse "NODES is not set: the nodes as pdsh names them, node[0-3] or a,b,c,d"
command -v pdsh > /dev/null || refuse "there is no pdsh on the PATH"
HEAD=${HEAD:-$(pdsh -N -R exec -w "$NODES" echo %n %h | sed -n 's/^0 //p')}
[ -n "$HEAD" ] || refuse "pdsh names no node for NODES=$NODES"
serve "$HEAD"
