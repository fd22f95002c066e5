"""examples/serve_vllm_*.sh on four nodes that are stand-ins: what they start, and what they refuse before they do."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_deepseek.model.architecture.presets import V3

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("serve_vllm_slurm.sh", "serve_vllm_pdsh.sh")
PROGRAMS = {
    # Node N of 0 to 3 runs what is asked of all; its host is nodeN.
    "srun": '''while [[ $1 == --* ]]; do shift; done
status=0
for n in 0 1 2 3; do SLURM_NODEID=$n HOSTNAME=node$n "$@" || status=$?; done
exit $status''',
    "pdsh": '''while [[ $1 == -* ]]; do [[ $1 != -[wR] ]] || shift; shift; done
status=0
for n in 0 1 2 3; do
    command=("${@//%h/node$n}")
    HOSTNAME=node$n "${command[@]//%n/$n}" || status=$?
done
exit $status''',
    "ssh": 'while [[ $1 == -o ]]; do shift 2; done; shift; exec bash -c "$*"',
    "scontrol": 'printf "node0\\nnode1\\nnode2\\nnode3\\n"',
    "vllm": '''if [ "$1" = --version ]; then [ "$HOSTNAME" != "${OTHER:-}" ] && echo 0.32.0 || echo 0.31.0; exit; fi
touch "$STUBS/serving"; sleep ${SERVES:-0}''',
    "nvidia-smi": '[[ $* == *compute-apps* ]] && { printf "${BUSY:-}"; exit; }; yes "NVIDIA H100" | head -${GPUS:-8}',
    "curl": '''[ -e "$STUBS/serving" ] || exit 7
[[ $* != *health* ]] || exit 0
echo '{"choices": [{"message": {"content": "2"}}]}' ''',
    "getent": 'exit 0', "ping": 'exit ${NO_PING:-0}'}


@pytest.fixture
def model(tmp_path) -> Path:
    """A released model as far as a check looks."""
    folder = tmp_path / "DeepSeek-R1"
    folder.mkdir()
    fields = V3.to_hf_dict() | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        (folder / shard).write_bytes(b"x")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", shards))}, indent=2))
    return folder


@pytest.fixture
def run(tmp_path, model):
    """Start a script among the stand-ins; `calls` of what it returns are vllm's servers, in order."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in PROGRAMS.items():
        (stubs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$STUBS/calls"\n{text}\n')
        (stubs / name).chmod(0o755)

    def start(script: str, **environ: str) -> subprocess.CompletedProcess:
        (stubs / "calls").write_text("")
        (stubs / "serving").unlink(missing_ok=True)
        given = {"PATH": f"{stubs}:{os.environ['PATH']}", "STUBS": str(stubs), "MODEL": str(model),
                 "POLL_SECONDS": "0.1", "TMPDIR": str(tmp_path), "NODES": "node[0-3]", "SLURM_JOB_ID": "7",
                 "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "x", "PORT": "28431", "RPC_PORT": "28432"}
        done = subprocess.run(["bash", str(EXAMPLES / script)], capture_output=True, text=True, env=given | environ,
                              timeout=60)
        lines = (stubs / "calls").read_text().splitlines()
        done.calls = [shlex.split(line) for line in lines if line.startswith("vllm serve")]
        return done

    return start


def value(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_node_gets_its_part(run, model, script):
    """One server with an address, three without, with the ranks of their own; then a question, and its answer."""
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert [value(words, "--data-parallel-start-rank") for words in done.calls] == [None, "1", "2", "3"]
    assert ["--headless" in words for words in done.calls] == [False, True, True, True]
    for words in done.calls:
        given = [value(words, f"--{name}") for name in (
            "tensor-parallel-size", "data-parallel-size", "data-parallel-size-local", "data-parallel-address")]
        assert words[2] == str(model) and given == ["8", "4", "1", "node0"] and "--enable-expert-parallel" in words
        assert value(words, "--data-parallel-rpc-port") == "28432"
    assert value(done.calls[0], "--port") == "28431"
    assert done.stdout.count("ok node") == 4 and '"content": "2"' in done.stdout
    assert "ready at http://node0:28431" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_reach_every_node(run, script):
    done = run(script, SERVED_NAME="r1", MAX_MODEL_LEN="4096", TP="4", VLLM_ARGS="--kv-cache-dtype fp8")
    assert done.returncode == 0, done.stderr
    assert [value(words, "--data-parallel-start-rank") for words in done.calls] == [None, "2", "4", "6"]
    for words in done.calls:
        assert [value(words, f"--{name}") for name in ("served-model-name", "max-model-len", "kv-cache-dtype")] == [
            "r1", "4096", "fp8"]


WRONG = {
    "another version on one node": ({"OTHER": "node2"}, "the nodes differ in vLLM, GPUs or config.json"),
    "GPUs in use": ({"BUSY": "4711\\n"}, "1 processes are on its GPUs"),
    "too few GPUs": ({"GPUS": "4"}, "4 GPUs, not GPUS_PER_NODE=8"),
    "no way to the first node": ({"NO_PING": "1"}, "node1: the first node, node0, does not answer a ping"),
    "no model": ({"MODEL": "/no/such"}, "MODEL=/no/such is no directory here"),
    "no vllm": ({"VLLM": "no-such"}, "VLLM=no-such is no program on the PATH"),
    "another precision": ({"PRECISION": "bf16"}, "is FP8: PRECISION=fp8, or convert it by"),
    "no precision": ({"PRECISION": "int4"}, "PRECISION=int4 is neither fp8 nor bf16"),
    "no number": ({"MAX_MODEL_LEN": "32k"}, "MAX_MODEL_LEN=32k is not a whole number")}


@pytest.mark.parametrize("environ, words", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_starts_where_something_is_wrong(run, script, environ, words):
    done = run(script, **environ)
    assert done.returncode == 2 and words in done.stderr and not done.calls, done.stderr


def test_files_of_the_model_are_looked_at(run, model):
    (model / "model-00002-of-00002.safetensors").unlink()
    assert "1 files that" in run(SCRIPTS[0]).stderr
    (model / "model-00002-of-00002.safetensors").write_bytes(b"x")
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({name: fields[name] for name in fields if "quant" not in name}))
    done = run(SCRIPTS[0])
    assert done.returncode == 2 and "is not quantised: PRECISION=bf16" in done.stderr
    assert run(SCRIPTS[0], PRECISION="bf16").returncode == 0
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert "is not of model_type deepseek_v3" in run(SCRIPTS[0]).stderr


def test_a_taken_port_is_told(run):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run(SCRIPTS[1], PORT=port)
    assert done.returncode == 2 and f"port {port} is taken; PORT= chooses another" in done.stderr and not done.calls


def test_servers_that_die_are_told(run, tmp_path):
    """They are not waited for, and no address is printed."""
    path = tmp_path / "stubs" / "vllm"
    path.write_text(path.read_text().replace('touch "$STUBS/serving"', "exit 1 #"))
    done = run(SCRIPTS[0])
    assert done.returncode == 1 and "have ended before they were ready" in done.stderr and "ready at" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_asks_no_node(run, script, tmp_path):
    done = run(script, DRY_RUN="1", MODEL="/models/DeepSeek-R1", SLURM_JOB_ID="", NODES="")
    assert done.returncode == 0 and "note: not on this machine: MODEL /models/DeepSeek-R1" in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["node 0", "node 1", "node 2", "node 3"]
    assert value(shlex.split(lines[3]), "--data-parallel-address") == "HOST_OF_NODE_0"
    assert (tmp_path / "stubs" / "calls").read_text() == ""
    assert run(script, DRY_RUN="1", TP="3").returncode == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_what_is_not_set(run, script):
    done = subprocess.run(["bash", str(EXAMPLES / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("DeepSeek-V3 or R1, 671B") and "PRECISION=" in done.stdout
    missing = {"serve_vllm_slurm.sh": {"SLURM_JOB_ID": ""}, "serve_vllm_pdsh.sh": {"NODES": ""}}[script]
    done = run(script, **missing)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"{script}: error: ")
