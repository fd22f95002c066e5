"""Every script of examples/ prints a command that the parser accepts on the ranks that the script is for."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.planning.pipeline_balance import resolve

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = {"DATA_PATH": "0.7 /data/web 0.3 /data/code", "TOKENIZER": "/data/tokenizer.json", "MASTER_ADDR": "host0",
        "NODE_RANK": "0"}


def dry_run(command: list[str], environ: dict[str, str]) -> list[str]:
    """The words of the torchrun command that `command` prints last, as it would start it."""
    result = subprocess.run(command, capture_output=True, text=True, check=True,
                            env={"PATH": os.environ["PATH"], "DRY_RUN": "1", **environ})
    return shlex.split(result.stdout.splitlines()[-1])


def torchrun_value(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def settings_of(words: list[str]):
    assert words[0] == "torchrun"
    entry = next(i for i, word in enumerate(words) if word.endswith("/pretrain_deepseek.py"))
    ranks = int(torchrun_value(words, "--nproc_per_node")) * int(torchrun_value(words, "--nnodes") or 1)
    return parse(words[entry + 1:], ranks)


def run_script(name: str, *arguments: str, **environ: str):
    return settings_of(dry_run(["bash", str(EXAMPLES / name), *arguments], {**DATA, **environ}))


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("pretrain_*.sh")))
def test_arguments_are_accepted(script):
    settings = run_script(script)
    stages = resolve(settings.model, settings.pipeline, settings.layout.pp, settings.data.seq_length)
    assert len(stages) == settings.layout.pp * settings.pipeline.num_virtual_stages


@pytest.mark.parametrize("processes, kinds", [(1, 0), (2, 1), (4, 2), (8, 3)])
def test_tiny_on_any_number_of_processes(processes, kinds):
    layout = run_script("pretrain_tiny.sh", NPROC=str(processes)).layout
    assert layout.world_size == processes
    assert (layout.pp > 1) + (layout.tp > 1) + (layout.ep > 1) == kinds


def test_tiny_refuses_another_number():
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_script("pretrain_tiny.sh", NPROC="3")
    assert failed.value.returncode == 2 and "NPROC 3" in failed.value.stderr


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
    assert run_script("pretrain_deepseek_v3.sh", NNODES="256", SCHEDULE="ZBVZeroBubble").layout.dp == 128
    with pytest.raises(ValueError, match="DualPipeV does not run with 24 micro-batches"):
        run_script("pretrain_deepseek_v3.sh", NNODES="256")


def test_slurm_starts_an_agent_on_each_node(tmp_path):
    """With stand-ins for Slurm's commands: node 1 of 2 gets its rank, the first host and the job's port."""
    for name, text in (("srun", 'shift; SLURM_NODEID=1 exec "$@"'), ("scontrol", "printf 'first\\nsecond\\n'")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environ = {name: value for name, value in DATA.items() if name not in ("MASTER_ADDR", "NODE_RANK")}
    environ |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "16", "SLURM_JOB_ID": "20007",
                "SLURM_JOB_NODELIST": "x"}
    words = dry_run(["bash", str(EXAMPLES / "slurm.sh"), str(EXAMPLES / "pretrain_deepseek_v2.sh"), "--seed", "5"],
                    environ)
    given = [torchrun_value(words, option) for option in ("--nnodes", "--node_rank", "--master_addr", "--master_port")]
    assert given == ["16", "1", "first", "20007"]
    assert settings_of(words).run.seed == 5
