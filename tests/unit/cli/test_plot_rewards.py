"""tools/plot_metrics.py --of rewards: what is read of a run, and that a picture comes out."""

import json

import numpy as np
import pytest

from megatron_deepseek.cli.plot import main
from megatron_deepseek.cli.plot_rewards import read_reward_curves

RECORDS = [
    {"iteration": 0, "eval_set": "held_out.jsonl", "eval_reward": 0.25},
    {"iteration": 1, "entropy": 2.0, "reward": 0.25, "mean_completion": 9.5, "longest_completion": 16},
    {"iteration": 2, "entropy": 1.9},  # the second update with a rollout
    {"iteration": 3, "entropy": 1.5, "reward": None, "mean_completion": 8.0, "longest_completion": 12},
    {"iteration": 4, "eval_set": "held_out.jsonl", "eval_reward": 0.5},
]


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "grpo" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_reads_rollouts_and_evaluations(run):
    curves = read_reward_curves(run, "mine")
    np.testing.assert_array_equal(curves.steps["iteration"], [1, 3])
    np.testing.assert_array_equal(curves.steps["reward"], [0.25, np.nan])
    np.testing.assert_array_equal(curves.steps["longest_completion"], [16, 12])
    np.testing.assert_array_equal(curves.held_out["eval_reward"], [0.25, 0.5])


def test_draws_one_run_and_several(run, capsys):
    assert main([str(run.parent), "--of", "rewards"]) == 0
    assert capsys.readouterr().out.strip() == str(run.with_name("rewards.png"))
    both = run.with_name("both.png")
    assert main([str(run), str(run), "--of", "rewards", "--labels", "a", "b", "--output", str(both)]) == 0
    assert both.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_rollouts_is_told(run, capsys):
    run.write_text('{"iteration": 1, "lm_loss": 2.0, "mtp_loss": [], "learning_rate": 1.0, "grad_norm": 1.0}\n')
    assert main([str(run), "--of", "rewards"]) == 2
    assert "holds no rollout" in capsys.readouterr().err
