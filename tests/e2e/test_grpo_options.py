"""Reinforcement learning with what other tasks have too: adapters, background saves, prompts in parquet files."""

from datetime import datetime
from decimal import Decimal

import pytest
import torch
from grpo_bench import GrpoBench
from transformers import DeepseekV3ForCausalLM

from megatron_deepseek.checkpoint.tracker import iterations
from megatron_deepseek.rl.rollouts import read_rollout

pytestmark = pytest.mark.slow

ITERATIONS = 6
RUN = ("--train-iters", str(ITERATIONS), "--global-batch-size", "8", "--save-interval", "3", "--kl", "k3", "--kl-beta",
       "0.1")
ADAPTERS = ("--lora-rank", "4", "--lora-alpha", "64")
TWO = ("--train-iters", "2")
REFRESHED = ("--reference-refresh-interval", "2")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> GrpoBench:
    return GrpoBench(tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def adapted(bench) -> list[dict]:
    return bench.train(1, "adapted", *RUN, *ADAPTERS)


def test_adapters_are_measured_by_their_base(bench, adapted):
    """In the second rollout the policy has moved, and the reference is still what transformers makes of --load."""
    base = DeepseekV3ForCausalLM.from_pretrained(bench.directory / "released", dtype=torch.float32)
    rollout = read_rollout(bench.directory / "adapted" / "iter_0000003")
    assert (rollout.iteration, len(rollout.samples)) == (2, 16)
    moved = 0.0
    for sample, old_T, reference_T in zip(rollout.samples, rollout.old, rollout.reference, strict=True):
        ids, tokens = torch.tensor([*sample.prompt, *sample.tokens]), torch.tensor(sample.tokens)
        with torch.no_grad():
            logits_TV = base(ids[None]).logits[0, -len(tokens) - 1:-1]
        expected_T = logits_TV.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        torch.testing.assert_close(reference_T.float(), expected_T, atol=1e-5, rtol=0)
        moved = max(moved, float((old_T - reference_T).abs().max()))
    assert moved > 0.01
    assert adapted[0]["kl"] < 1e-9 and adapted[-2]["kl"] > 1e-3


def test_adapters_learn_the_same_on_two_ranks(bench, adapted):
    found = bench.train(2, "adapted-2", *RUN, *ADAPTERS, *TWO, "--expert-model-parallel-size", "2")
    for one, two in zip(adapted[:2], found, strict=True):
        for name in ("grpo_loss", "kl", "grad_norm", "entropy"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("more", [
    pytest.param(ADAPTERS, id="adapters", marks=pytest.mark.long),
    pytest.param(REFRESHED, id="refreshed", marks=pytest.mark.long),
    pytest.param((*ADAPTERS, *REFRESHED), id="both")])
def test_a_run_with_background_saves_goes_on_after_a_kill(bench, adapted, more):
    """It is gone in its second save, which has waited for the first one: between two updates with a rollout."""
    name = "-".join(each.strip("-") for each in more)
    expected = adapted if more == ADAPTERS else bench.train(1, f"whole-{name}", *RUN, *more)
    bench.die(name, "save:2", *RUN, *more, "--async-save")
    assert iterations(bench.directory / name) == [3]
    assert bench.train(1, name, *RUN, *more, "--async-save") == expected
    whole = "adapted" if more == ADAPTERS else f"whole-{name}"
    assert bench.samples(name) == bench.samples(whole)
    assert bench.weights(name, ITERATIONS) == bench.weights(whole, ITERATIONS)


def test_prompts_come_from_parquet_too(bench):
    """Also rows with values that JSON does not have."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": str(number), "answer": str(number + 1), "when": datetime(2026, 1, 1 + number),
             "price": Decimal("1.50"), "image": b"\x89PNG\xff"} for number in range(6)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), bench.directory / "prompts.parquet", row_group_size=4)
    found = bench.train(1, "parquet", *RUN, *TWO, "--prompts", str(bench.directory / "prompts.parquet"))
    assert found == bench.train(1, "jsonl", *RUN, *TWO)
