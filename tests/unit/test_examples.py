"""Every script of examples/ starts a command that the parser accepts on the ranks that it is for, and names those.

`PYTHON=echo` has a script print what it would start; DRY_RUN=1, which checks it too, is tried where that is the point.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.arguments.grpo import build_grpo_parser
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.model.architecture.adapters import LoraSettings
from megatron_deepseek.model.architecture.base_weights import BaseSettings
from megatron_deepseek.model.architecture.presets import V3
from megatron_deepseek.planning.pipeline_balance import resolve

EXAMPLES = Path(__file__).parents[2] / "examples"
PATH = os.environ["PATH"]
DATA = {"DATA_PATH": "0.7 /data/web 0.3 /data/code", "TOKENIZER": "/data/tokenizer.json", "MASTER_ADDR": "host0",
        "NODE_RANK": "0", "DATASET": "0.7 chats.jsonl 0.3 code.jsonl", "TEACHER": "/models/teacher",
        "PROMPTS": "prompts.jsonl", "REWARD": "exact format:0.2"}
PARSERS = {"pretrain_deepseek.py": build_parser, "finetune_deepseek.py": build_finetuning_parser,
           "train_grpo.py": build_grpo_parser}
NODES = (1, 2, 3, 8, 16, 20, 32, 48, 64, 128, 256, 512, 1000)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> str:
    """What a script needs of a released model before anything is loaded: names and config."""
    folder = tmp_path_factory.mktemp("DeepSeek-V3")
    (folder / "config.json").write_text(json.dumps(V3.to_hf_dict()))
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    return str(folder)


def bash(*command: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *command], capture_output=True, text=True, env={"PATH": PATH, **environ})


def words_of(done: subprocess.CompletedProcess) -> list[str]:
    """Of the command that is printed last."""
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


def value(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def settings_of(words: list[str]):
    assert words[0].endswith("launch.py") or words[1].endswith("/tools/launch.py")
    entry = next(i for i, word in enumerate(words) if word.endswith(tuple(PARSERS)))
    ranks = int(value(words, "--nproc_per_node")) * int(value(words, "--nnodes") or 1)
    return parse(words[entry + 1:], ranks, None, PARSERS[Path(words[entry]).name])


def run_script(name: str, *arguments: str, **environ: str):
    return settings_of(words_of(bash(str(EXAMPLES / name), *arguments, **{**DATA, "PYTHON": "echo", **environ})))


TRAINING = ("pretrain", "continue", "finetune", "dpo", "distill", "grpo")  # serve_*: test_serving_examples.py
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*_*.sh") if path.name.startswith(TRAINING))


@pytest.mark.parametrize("script", SCRIPTS)
def test_any_number_of_nodes_has_a_layout_or_is_told_which_have(script, released):
    """One of the nodes named is enough to start; all of NODES are accepted or named in one line."""
    fitting = []
    for nodes in NODES:
        environ = {**DATA, "PYTHON": "echo", "MODEL": released, "NNODES": str(nodes)}
        done = bash(str(EXAMPLES / script), **environ)
        if done.returncode == 0:
            settings = settings_of(words_of(done))
            stages = resolve(settings.model, settings.pipeline, settings.layout.pp, settings.data.seq_length)
            assert len(stages) == settings.layout.pp * settings.pipeline.num_virtual_stages
            fitting.append(nodes)
            continue
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"NNODES={nodes}" in done.stderr
        named = list(map(int, done.stderr.split("have: ")[1].split()))
        assert nodes not in named and set(fitting) <= set(named)
    assert fitting


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_not_set_is_told_in_a_line(script):
    done = bash(str(EXAMPLES / script), NNODES="0x1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"{script}: error: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_what_the_script_says_of_itself(script):
    done = bash(str(EXAMPLES / script), "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "DeepSeek-" in done.stdout.splitlines()[0] and "DRY_RUN=1 checks" in done.stdout


def test_common_is_no_script_of_its_own():
    done = bash(str(EXAMPLES / "common.sh"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_the_gpus_of_a_node_count_too():
    assert run_script("pretrain_deepseek_v3.sh", NNODES="32", GPUS_PER_NODE="4").layout.world_size == 128
    done = bash(str(EXAMPLES / "pretrain_deepseek_v2_lite.sh"), **DATA, GPUS_PER_NODE="4")
    assert done.returncode == 2 and "NNODES that have: 2 4 8 16 32 64 128" in done.stderr


def test_every_node_needs_its_number_and_the_first_host():
    done = bash(str(EXAMPLES / "pretrain_deepseek_v2.sh"), **{**DATA, "NODE_RANK": "", "PYTHON": "echo"})
    assert done.returncode == 2 and "NODE_RANK is not set: on each of the 16 nodes" in done.stderr


def test_a_dry_run_checks_and_needs_no_node():
    """In one line, which is not torchrun's or bash's; what is not on this machine is only noted."""
    data = {"DATA_PATH": "/data/web", "TOKENIZER": "/data/tokenizer.json", "DRY_RUN": "1", "PYTHON": sys.executable}
    script = str(EXAMPLES / "pretrain_deepseek_v3.sh")
    done = bash(script, **data)
    assert settings_of(words_of(done)).layout.world_size == 1024
    assert "note: not on this machine: /data/web.idx of DATA_PATH" in done.stderr
    done = bash(script, "--lr", "much", **data)
    assert (done.returncode, done.stdout) == (2, "") and "pretrain_deepseek.py: error: --lr: 'much'" in done.stderr
    done = bash(script, **data, SCHEDULE="DualPipeV", NNODES="256")
    assert done.returncode == 2 and "DualPipeV does not run with 24 micro-batches" in done.stderr


@pytest.fixture
def copied(tmp_path) -> Path:
    """A repository that is nothing but examples and an environment whose python says where it is."""
    for name in ("examples", "tools", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    for path in EXAMPLES.glob("*.sh"):
        (tmp_path / "examples" / path.name).write_bytes(path.read_bytes())
    program(tmp_path / ".venv/bin/python", 'echo "dotvenv $@"')
    return tmp_path


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_the_environment_is_found(copied):
    """PYTHON=, else the active one, else .venv, else python3: nobody has to activate anything."""
    tiny, active = str(copied / "examples/pretrain_tiny.sh"), copied / "active"
    (active / "bin").mkdir(parents=True)
    program(active / "bin/python", 'echo "active $@"')
    assert words_of(bash(tiny))[0] == "dotvenv"
    assert words_of(bash(tiny, VIRTUAL_ENV=str(active)))[0] == "active"
    assert words_of(bash(tiny, VIRTUAL_ENV=str(active), PYTHON="echo"))[0].endswith("launch.py")
    assert bash(tiny, PYTHON="no-such").stderr == "pretrain_tiny.sh: error: PYTHON=no-such is no program\n"
    (copied / ".venv/bin/python").unlink()
    program(active / "bin/python3", 'echo "path $@"')
    assert words_of(bash(tiny, PATH=f"{active}/bin:{PATH}"))[0] == "path"
    bare = copied / "bare"
    bare.mkdir()
    for name in ("dirname", "basename", "getconf"):
        (bare / name).symlink_to(subprocess.run(["which", name], capture_output=True, text=True).stdout.strip())
    shell = subprocess.run(["which", "bash"], capture_output=True, text=True).stdout.strip()
    done = subprocess.run([shell, tiny], capture_output=True, text=True, env={"PATH": str(bare)})
    assert done.returncode == 2 and "no Python: make venv in" in done.stderr


@pytest.mark.parametrize("processes, kinds", [(1, 0), (2, 1), (4, 2), (8, 3)])
def test_tiny_on_any_number_of_processes(processes, kinds):
    layout = run_script("pretrain_tiny.sh", NPROC=str(processes)).layout
    assert layout.world_size == processes
    assert (layout.pp > 1) + (layout.tp > 1) + (layout.ep > 1) == kinds


def test_tiny_refuses_another_number():
    done = bash(str(EXAMPLES / "pretrain_tiny.sh"), NPROC="3", PYTHON="echo")
    assert done.returncode == 2 and done.stderr == "pretrain_tiny.sh: error: NPROC=3 is not one of 1, 2, 4, 8\n"


def test_arguments_are_passed_through():
    assert run_script("pretrain_tiny.sh", "--lr", "1e-3").learning_rate.lr == 1e-3


def test_v3_is_its_report():
    """Technical report, section 4.2: the lengths in tokens come back from samples of 4096."""
    settings = run_script("pretrain_deepseek_v3.sh")
    assert (settings.layout.pp, settings.layout.ep, settings.layout.dp, settings.layout.tp) == (16, 64, 64, 1)
    tokens = settings.run.train_samples * 4096
    assert tokens / 1e12 == pytest.approx(14.8, rel=1e-4)
    after_bias = (settings.run.train_samples - settings.loss.moe_router_bias_update_samples) * 4096
    assert after_bias / 1e12 == pytest.approx(0.5, rel=1e-3)
    assert settings.model.rope_scaling is None


def test_v3_in_its_reports_precision():
    settings = run_script("pretrain_deepseek_v3.sh", FP8="1")
    assert (settings.run.bf16, settings.run.fp8_format, settings.optimizer.exp_avg_dtype) == (True, "e4m3", "bf16")
    assert run_script("pretrain_deepseek_v3.sh").run.fp8_format is None


def test_v3_on_twice_the_nodes():
    settings = run_script("pretrain_deepseek_v3.sh", NNODES="256")
    assert (settings.layout.dp, settings.pipeline.schedule) == (128, "1F1B")
    assert run_script("pretrain_deepseek_v3.sh", NNODES="512").pipeline.schedule == "ZBVZeroBubble"


def test_continuing_v3_begins_with_its_files(released):
    settings = run_script("continue_deepseek_v3.sh", MODEL=released, TOKENIZER="", OUT="/out")
    assert (settings.layout.world_size, settings.layout.ep, settings.offload.optimizer_cpu_offload) == (128, 8, True)
    assert str(settings.run.load) == settings.data.tokenizer_model == released
    assert settings.model.rope_scaling == V3.rope_scaling and str(settings.run.save_hf) == "/out"


@pytest.mark.parametrize("size, nodes, stages", [("qwen-1.5b", 1, 2), ("qwen-32b", 2, 4), ("llama-70b", 8, 4)])
def test_students_of_every_size_have_a_layout(size, nodes, stages):
    """Two heads of keys over four ranks among them. R1's rows are 128 of 32,768 tokens."""
    settings = run_script("finetune_r1_distill_qwen.sh", MODEL=f"deepseek-r1-distill-{size}", NNODES=str(nodes))
    assert (settings.layout.tp, settings.layout.pp, settings.layout.dp) == (4, stages, 8 * nodes // 4 // stages)
    assert (settings.batch.global_batch_size, settings.data.seq_length) == (128, 32768)
    assert settings.model.grouped_query and settings.fine_tuning.template == "deepseek-r1"


@pytest.mark.parametrize("gpus, expert_ranks", [("1", 1), ("4", 4), ("8", 8)])
def test_qlora_of_v2_lite_is_llama_factorys_recipe(gpus, expert_ranks):
    """As DeepSeek's page of V2-Lite has it: 2 conversations x 8 on each GPU."""
    settings = run_script("finetune_v2_lite_qlora.sh", MODEL="deepseek-v2-lite", GPUS_PER_NODE=gpus, OUT="/adapter")
    assert settings.lora == LoraSettings(16, 16.0, ("all",)) and settings.lora.scale == 1.0
    assert settings.base == BaseSettings(4, double_quantization=True)
    batch, rate = settings.batch, settings.learning_rate
    assert (batch.micro_batch_size, batch.global_batch_size) == (2, 16 * int(gpus))
    assert (settings.data.seq_length, settings.run.epochs, rate.lr_decay_style) == (4096, 5, "cosine")
    assert settings.layout.ep == expert_ranks and not settings.fine_tuning.packing
    assert (str(settings.run.save_adapter), settings.run.save_hf) == ("/adapter", None)


class Slurm:
    """Stand-ins for Slurm's commands, which write down how they are called; srun is node 1 of 16 and ends as told."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.program("srun", 'shift; SLURM_NODEID=1 "$@"; exit ${STATUS:-0}')
        self.program("scontrol", '[ "$1" != show ] || printf "first\\nsecond\\n"\n'
                                 '[ "$1" != requeue ] || exit ${REQUEUE_STATUS:-0}')
        self.program("sbatch", "")
        self.program("squeue", "echo 1-00:00:00")

    def program(self, name: str, text: str) -> None:
        program(self.folder / name, f'echo "{name} $*" >> {self.folder}/calls\n{text}')

    def job(self, script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
        (self.folder / "calls").write_text("")
        given = {name: text for name, text in DATA.items() if name not in ("MASTER_ADDR", "NODE_RANK")}
        given |= {"SLURM_NNODES": "16", "SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "x", "PYTHON": "echo",
                  "SLURM_JOB_PARTITION": "gpu", "PATH": f"{self.folder}:{PATH}"}
        return bash(str(EXAMPLES / "slurm.sh"), str(EXAMPLES / script), *arguments, **(given | environ))

    def calls(self, name: str) -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.split()[0] == name]


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def test_slurm_starts_an_agent_on_each_node(slurm):
    """Node 1 of 16 gets its rank, the first host and the job's port; what saves often comes with it."""
    words = words_of(slurm.job("pretrain_deepseek_v2.sh", "--seed", "5"))
    given = [value(words, option) for option in ("--nnodes", "--node_rank", "--master_addr", "--master_port")]
    assert given == ["16", "1", "first", "20007"]
    run = settings_of(words).run
    assert (run.seed, run.save_every_seconds, run.async_save) == (5, 1800.0, True)
    assert not slurm.calls("sbatch") and len(slurm.calls("scontrol")) == 1


def test_slurm_takes_other_arguments_of_saving(slurm):
    run = settings_of(words_of(slurm.job("pretrain_deepseek_v2.sh", SAVE_ARGS=""))).run
    assert (run.save_every_seconds, run.async_save) == (None, False)
    run = settings_of(words_of(slurm.job("pretrain_deepseek_v2.sh", "--save-every-seconds", "60"))).run
    assert (run.save_every_seconds, run.async_save) == (60.0, True)


def test_slurm_requeues_what_left_when_its_time_was_up(slurm):
    """And nothing else: what has finished or failed stays so. 138 is what launch.py ends with on SIGUSR1."""
    done = slurm.job("pretrain_deepseek_v2.sh", STATUS="138")
    assert done.returncode == 0 and slurm.calls("scontrol")[-1] == "scontrol requeue 20007"
    assert not slurm.calls("sbatch") and "goes back into the queue" in done.stdout
    for status in ("0", "1", "2", "137", "143"):
        assert slurm.job("pretrain_deepseek_v2.sh", STATUS=status).returncode == int(status)
        assert len(slurm.calls("scontrol")) == 1 and not slurm.calls("sbatch")
    assert slurm.job("pretrain_deepseek_v2.sh", STATUS="138", REQUEUE="0").returncode == 138
    assert len(slurm.calls("scontrol")) == 1


def test_slurm_submits_again_where_requeueing_is_refused(slurm):
    script = EXAMPLES / "pretrain_deepseek_v2.sh"
    done = slurm.job(script.name, "--seed", "5", STATUS="138", REQUEUE_STATUS="1", SLURM_JOB_ACCOUNT="mine")
    assert done.returncode == 0 and slurm.calls("sbatch") == [
        "sbatch --dependency=afterany:20007 --nodes=16 --partition=gpu --account=mine --time=1-00:00:00 "
        f"{EXAMPLES}/slurm.sh {script} --seed 5"]


def test_slurm_tells_a_mistake_once_and_starts_no_node(slurm):
    done = slurm.job("pretrain_deepseek_v2.sh", "--learning-rate", "3", PYTHON=sys.executable)
    assert done.returncode == 2 and not slurm.calls("srun")
    assert [line for line in done.stderr.splitlines() if not line.startswith("note:")] == [
        "pretrain_deepseek.py: error: --learning-rate is no option; did you mean --lr?"]
    done = slurm.job("pretrain_deepseek_v2.sh", SLURM_NNODES="20")
    assert done.returncode == 2 and not slurm.calls("srun") and "NNODES that have: 8 16 32" in done.stderr
    done = slurm.job("no_such.sh")
    assert done.returncode == 2 and "no file" in done.stderr


def test_slurm_says_that_it_is_for_sbatch_and_looks_without(slurm):
    done = slurm.job("pretrain_deepseek_v2.sh", SLURM_JOB_ID="")
    assert done.returncode == 2 and "this is no job; sbatch" in done.stderr and not slurm.calls("srun")
    done = slurm.job("pretrain_deepseek_v2.sh", SLURM_JOB_ID="", SLURM_NNODES="", NNODES="32", DRY_RUN="1")
    assert settings_of(words_of(done)).layout.world_size == 256 and not slurm.calls("srun")


class Pdsh:
    """Stand-ins for pdsh, which runs the command for each host in turn, and for ssh, which runs it here."""

    def __init__(self, folder: Path):
        self.folder = folder
        program(folder / "pdsh", """
            while [[ $1 == -* ]]; do [ "$1" = -w ] && list=$2; [[ $1 == -[Rwf] ]] && shift; shift; done
            list=${list/node\\[0-15\\]/$(seq -s, -f node%g 0 15)}
            status=0 number=0
            for host in ${list//,/ }; do
                words=()
                for word in "$@"; do
                    word=${word//%%/$'\\1'} word=${word//%n/$number} word=${word//%h/$host}
                    words+=("${word//$'\\1'/%}")
                done
                "${words[@]}" || status=$?
                number=$((number + 1))
            done
            exit $status""")
        program(folder / "ssh", """
            echo "ssh $*" >> %s/calls
            while [[ $1 == -* ]]; do [ "$1" = -o ] && shift; shift; done
            exec bash -c "$2" """ % folder)

    def start(self, script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
        (self.folder / "calls").write_text("")
        given = {name: text for name, text in DATA.items() if name not in ("MASTER_ADDR", "NODE_RANK")}
        given |= {"PATH": f"{self.folder}:{PATH}", "PYTHON": "echo", "LOG_DIR": "/logs"}
        return bash(str(EXAMPLES / "pdsh.sh"), str(EXAMPLES / script), *arguments, **(given | environ))

    def hosts(self) -> list[str]:
        return [line.split()[6] for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def pdsh(tmp_path):
    return Pdsh(tmp_path)


def test_pdsh_starts_an_agent_on_each_node(pdsh):
    """Each with its number, the first host, and a folder for what its ranks print; all words arrive as they were."""
    done = pdsh.start("pretrain_deepseek_v2.sh", "--wandb-exp-name", "it's %h, 100% \"new\" $HOME", HOSTS="node[0-15]")
    assert done.returncode == 0 and pdsh.hosts() == [f"node{number}" for number in range(16)]
    lines = [shlex.split(line) for line in done.stdout.splitlines() if "launch.py" in line and "\\" in line]
    commands = [words for words in lines if words[0].endswith("launch.py") or words[1].endswith("launch.py")]
    assert len(commands) == 16
    for number, words in enumerate(commands):
        given = [value(words, option) for option in ("--nnodes", "--node_rank", "--master_addr", "--log-dir", "--tee")]
        assert given == ["16", str(number), "node0", f"/logs/node-{number}", "3"]
        assert value(words, "--wandb-exp-name") == "it's %h, 100% \"new\" $HOME"
        assert value(words, "--data-path") == "0.7" and settings_of(words).layout.world_size == 128


def test_pdsh_passes_on_what_the_scripts_read(pdsh):
    """Every variable that a script has a use for, those of NCCL and the like, and what EXPORT names."""
    started = (path for path in EXAMPLES.glob("*_*.sh") if not path.name.startswith(("serve_", "vllm_")))
    text = "".join(path.read_text() for path in started) + (EXAMPLES / "common.sh").read_text()
    read = set(re.findall(r"\$\{([A-Z][A-Z_]+):[-+?]|(?:require|count) ([A-Z][A-Z_]+)", text))
    read = {name for pair in read for name in pair if name} - {"NAME", "NODE_RANK", "DRY_RUN"}
    values = {"NPROC": "4", "STEPS": "3", "GPUS_PER_NODE": "4", "NCCL_DEBUG": "INFO", "EXPORT": "MINE", "MINE": "a b",
              "MASTER_ADDR": "10.0.0.1", "PYTHON": "echo"}
    environ = {name: "1" for name in read - {"BATCH", "MASTER_PORT", "OMP_NUM_THREADS", "LOG_DIR"}} | values
    done = pdsh.start("pretrain_tiny.sh", **environ, HOSTS="a, b", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    remote = shlex.split(shlex.split(done.stdout.splitlines()[-2])[-1])
    passed = dict(word.split("=", 1) for word in remote[4:remote.index("bash")])
    assert read - {"BATCH", "OMP_NUM_THREADS"} <= set(passed) and passed["MINE"] == "a b"
    assert (passed["NNODES"], passed["MASTER_ADDR"], passed["NCCL_DEBUG"]) == ("2", "10.0.0.1", "INFO")
    assert not pdsh.hosts(), "DRY_RUN=1 starts nothing"


def test_pdsh_reads_a_hostfile_and_tells_mistakes_once(pdsh, tmp_path):
    (tmp_path / "hosts").write_text("# the cluster\nnode7 slots=8\n\nnode9 slots=8  # slow\n")
    assert pdsh.start("pretrain_tiny.sh", HOSTFILE=str(tmp_path / "hosts")).returncode == 0
    assert pdsh.hosts() == ["node7", "node9"]
    for environ, message in (
            ({}, "pdsh.sh: error: HOSTS is not set: the nodes"), ({"HOSTFILE": "none"}, "pdsh.sh: error: no file none"),
            ({"HOSTS": "a,b,a"}, "pdsh.sh: error: the host a is named twice"),
            ({"HOSTS": "a", "NPROC": "3"}, "pretrain_tiny.sh: error: NPROC=3 is not one of")):
        done = pdsh.start("pretrain_tiny.sh", **environ)
        assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
        assert not pdsh.hosts()


def test_a_node_that_is_hung_up_on_ends_its_agent_by_sigterm(tmp_path):
    """As torchrun's agent is ended elsewhere: the hang-up would end the ranks before they have saved."""
    (tmp_path / "script.sh").write_text(
        "trap 'echo saved; exit 143' TERM\ntrap 'echo hung up' HUP\necho begun\nwhile :; do sleep 0.1; done\n")
    node = subprocess.Popen(["bash", str(EXAMPLES / "pdsh.sh"), "--node", str(tmp_path / "script.sh")], text=True,
                            stdout=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # else not under nohup
    assert node.stdout.readline() == "begun\n"
    os.killpg(node.pid, signal.SIGHUP)
    assert node.communicate(timeout=20)[0] == "saved\n" and node.returncode == 143


def test_what_ranks_print_is_kept_where_it_is_asked_for():
    words = words_of(bash(str(EXAMPLES / "pretrain_tiny.sh"), PYTHON="echo", LOG_DIR="/logs"))
    assert (value(words, "--log-dir"), value(words, "--tee")) == ("/logs/node-0", "3")
    assert "--log-dir" not in words_of(bash(str(EXAMPLES / "pretrain_tiny.sh"), PYTHON="echo"))


def test_slurm_has_what_the_page_on_checkpoints_ascribes_to_it():
    page, script = (EXAMPLES.parent / "docs" / "checkpoints.md").read_text(), (EXAMPLES / "slurm.sh").read_text()
    directives = [line.split("  ")[0].strip() for line in page.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@300"} <= set(directives) <= set(script.splitlines())
    for words in ("--save-every-seconds 1800", "--async-save"):
        assert words in page and words in script
