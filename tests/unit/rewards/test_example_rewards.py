"""examples/rewards.py through --reward, by hand."""

from pathlib import Path

from megatron_deepseek.rewards.spec import parse_rewards
from megatron_deepseek.rewards.workers import RewardWorkers

FILE = Path(__file__).parents[3] / "examples" / "rewards.py"


def test_the_examples():
    """Two prompts, the first with two answers."""
    specs = parse_rewards([f"{FILE}:{name}" for name in ("short", "nearest", "shortest_of_group")])
    completions = ["so " * 30 + "</think>It is 4", "word " * 21 + "5", "no number"]
    rows = [{"answer": "4", "short": True}] * 2 + [{"answer": 4}]
    with RewardWorkers(specs, 20.0, processes=1) as workers:
        found = workers.score(["a", "a", "b"], completions, rows)
    assert found.values == {"short": [1, 0, None], "nearest": [1, 0.5, 0], "shortest_of_group": [1, 0, 1]}
