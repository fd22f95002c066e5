"""Reinforcement learning as a user runs it: what is kept of a rollout, kills, ranks, and rewards that misbehave."""

import math

import pytest
from grpo_bench import GrpoBench

# As little as has an update behind a save with a rollout that is partly used, and a reference that is not the origin.
ITERATIONS = 8
RUN = ("--train-iters", str(ITERATIONS), "--global-batch-size", "8", "--save-interval", "5", "--kl", "k3", "--kl-beta",
       "0.1", "--reference-refresh-interval", "4", "--dynamic-sampling", "--max-sampling-rounds", "2", "--keep-routing")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> GrpoBench:
    return GrpoBench(tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def alone(bench) -> list[dict]:
    """The records of a run that nothing disturbs."""
    return bench.train(1, "alone", *RUN)


def test_a_rollout_is_reported_and_its_samples_are_kept(bench, alone):
    """Two updates use a rollout: its numbers stand in the first one's record."""
    assert [("reward" in record) for record in alone] == [True, False] * (ITERATIONS // 2)
    first, second = alone[:2]
    assert first["rollout_difference"] < 1e-5 and first["kl_to_old"] == pytest.approx(0.0, abs=1e-9)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6) and second["kl"] > 1e-5 and second["kl_to_old"] > 1e-7
    samples = bench.samples("alone")
    assert list(samples) == [f"step_{number}.jsonl" for number in (1, 3, 5, 7)]
    for record in samples["step_1.jsonl"]:
        assert record["reward"] == record["rewards"]["vowels"] == sum(map(ord, record["completion"])) % 3
        assert record["finish_reason"] in ("stop", "length") and record["prompt"].startswith("<｜begin▁of▁sentence｜>")
        assert record["log_probability"] == pytest.approx(record["rollout_log_probability"], abs=1e-4)
    by_group: dict[int, list[float]] = {}
    for record in samples["step_1.jsonl"]:
        by_group.setdefault(record["group"], []).append(record["reward"])
    assert all(len(rewards) == 4 and len(set(rewards)) > 1 for rewards in by_group.values())
    assert first["reward"] == pytest.approx(sum(map(sum, by_group.values())) / first["samples"])


@pytest.mark.parametrize("death", [
    # Behind a save, between two updates with a rollout; the reference is that of iteration 4.
    pytest.param("step:6", marks=pytest.mark.slow), pytest.param("token:30", marks=pytest.mark.slow),
    *(pytest.param(death, marks=pytest.mark.long) for death in ("reward:3", "score:4", "record:4", "save:1",
                                                                "reference:1", "save:2"))])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(bench, alone, death):
    save = f"killed-{death.replace(':', '-')}"
    bench.die(save, death, *RUN)
    assert bench.train(1, save, *RUN) == alone
    assert bench.samples(save) == bench.samples("alone")
    assert bench.weights(save, ITERATIONS) == bench.weights("alone", ITERATIONS)


TWO_UPDATES = ("--train-iters", "2", "--kl", "unbiased", "--kl-beta", "0.1", "--global-batch-size", "8",
               "--keep-routing")


@pytest.fixture(scope="module")
def expected(bench) -> list[dict]:
    """The records of one process."""
    return bench.train(1, "one", *TWO_UPDATES)


@pytest.mark.parametrize("layout", [
    "--expert-model-parallel-size 2",
    pytest.param("--pipeline-model-parallel-size 2 --pipeline-schedule ZBVZeroBubble", marks=pytest.mark.slow),
    *(pytest.param(layout, marks=pytest.mark.long) for layout in (
        "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel",
        "--context-parallel-size 2"))])
def test_ranks_draw_the_same_samples_and_learn_the_same(bench, expected, layout):
    """Two ranks of a training layout, among which the prompts of a rollout are divided as the engine's layout says."""
    save = layout.replace(" ", "")
    found = bench.train(2, save, *TWO_UPDATES, *layout.split())
    ours, theirs = bench.samples(save)["step_1.jsonl"], bench.samples("one")["step_1.jsonl"]
    assert [(each["completion"], each["reward"], each["group"]) for each in ours] == [
        (each["completion"], each["reward"], each["group"]) for each in theirs]
    for one, two in zip(expected, found):
        for name in ("grpo_loss", "kl", "grad_norm", "entropy"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


def test_what_was_drawn_is_kept_for_training(bench):
    """Routing and sampling mask: training finds the probabilities of the rollout; the reference routes by itself, and
    is the same model. Held-out prompts are answered at both ends.
    """
    record = bench.train(1, "kept", "--train-iters", "1", "--keep-routing", "--keep-sampling-mask", "--top-k", "20",
                         "--temperature", "0.7", "--kl", "k3", "--kl-beta", "0.1", "--eval-prompts",
                         str(bench.directory / "prompts.jsonl"))[-1]
    assert record["eval_answers"] == 6 and 0 <= record["eval_reward_vowels"] <= 2
    step = bench.metrics("kept")[-2]
    assert step["rollout_difference"] < 1e-5 and step["kl"] == pytest.approx(0.0, abs=1e-6)


def test_rewards_that_misbehave_are_counted_and_named(bench):
    rewards = str(bench.directory / "rewards.py")
    (record,) = bench.train(
        1, "misbehaving", "--train-iters", "1", "--reward", f"{rewards}:throws", "--reward", f"{rewards}:hangs",
        "--reward", f"{rewards}:gives_nan:0.5", "--reward-timeout", "0.5", "--grpo-prompts-per-step", "6",
        reward="first_letter")
    assert record["reward_failures_throws_raised"] == record["reward_failures_hangs_timed_out"] == 24
    assert record["reward_failures_gives_nan_not_finite"] == 4 and record["unrewarded_groups"] == 0
    assert record["reward_throws"] is None and record["reward_gives_nan"] == 1.0
    assert math.isfinite(record["grpo_loss"]) and record["samples"] == 24


def test_groups_without_any_reward_are_left_out(bench):
    (record,) = bench.train(1, "unrewarded", "--train-iters", "1", "--grpo-prompts-per-step", "6", reward="gives_nan")
    assert (record["unrewarded_groups"], record["samples"], record["zero_variance_groups"]) == (1, 20, 5)
    assert {each["prompt"][-14] for each in bench.samples("unrewarded")["step_1.jsonl"]} <= set("013456<")


def test_a_rollout_without_any_reward_changes_nothing(bench):
    """There are two updates with none of its samples, and the run goes on."""
    found = bench.train(1, "nothing", "--train-iters", "2", "--global-batch-size", "8", "--kl", "k3", reward="throws")
    assert [(record["grpo_loss"], record["grad_norm"]) for record in found] == [(0.0, 0.0)] * 2
    assert (found[0]["unrewarded_groups"], found[0]["samples"], found[0]["reward"]) == (4, 0, None)


def test_mistakes_end_in_one_line(bench):
    job = bench.run(1, "wrong", "nothing", "--train-iters", "1")
    assert job.status == 2 and "rewards.py defines no nothing" in job.output.splitlines()[-1]
    job = bench.run(1, "wrong", "vowels", "--train-iters", "1", "--prompt-column", "question")
    assert job.status == 2 and "prompts.jsonl line 1: the row has no question" in job.output.splitlines()[-1]
