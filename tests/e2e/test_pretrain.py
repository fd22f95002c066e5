"""pretrain_deepseek.py as a user runs it: it learns, every layout agrees, it resumes exactly, it refuses bad input."""

import json
import re
import shlex
import shutil

import pytest

from megatron_deepseek.cli.rerun import main as rerun
from megatron_deepseek.runtime.expert_load import read_history

STEP = ("lm_loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "tokens")


def steps(metrics: list[dict]) -> list[dict]:
    return [record for record in metrics if "lm_loss" in record]


def validations(metrics: list[dict]) -> list[dict]:
    return [record for record in metrics if "validation_lm_loss" in record]


@pytest.fixture(scope="module")
def alone(workshop) -> list[dict]:
    """Six steps on one rank, with a checkpoint after the third and the last."""
    return workshop.train(1, "alone", "--save-interval", "3")


def assert_same_run(metrics: list[dict], reference: list[dict]) -> None:
    """Float32 in another order of additions: 1e-4 on losses, 1e-3 on gradient norms, as users are promised."""
    assert [record["iteration"] for record in steps(metrics)] == [record["iteration"] for record in steps(reference)]
    for ours, theirs in zip(steps(metrics), steps(reference)):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-4)
        assert ours["mtp_loss"] == pytest.approx(theirs["mtp_loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["tokens"] == theirs["tokens"] == 16 * 32
        assert ours.get("source_tokens") == theirs.get("source_tokens")
        assert ours.get("source_loss", {}) == pytest.approx(theirs.get("source_loss", {}), rel=1e-4)
    for ours, theirs in zip(validations(metrics), validations(reference), strict=True):
        assert ours["validation_lm_loss"] == pytest.approx(theirs["validation_lm_loss"], rel=1e-4)
        assert ours.get("validation_source_loss", {}) == pytest.approx(
            theirs.get("validation_source_loss", {}), rel=1e-4)


def test_a_start_and_its_experts_are_kept(workshop, alone, capsys):
    """Of 4 layers the first is dense; an MTP module comes after them. 6 steps are too few for a picture."""
    save = workshop.directory / "alone"
    history = read_history(save / "expert_load.jsonl")
    assert [iteration for iteration, _ in history.violations] == [1, 2, 3, 4, 5, 6]
    assert all(set(violation) == {1, 2, 3, 4} and all(0 <= value < 3 for value in violation.values())
               for _, violation in history.violations)  # 8 experts, of which a token has 2: at most 8 / 2 - 1
    (start,) = json.loads((save / "run.json").read_text())["starts"]
    assert start["iteration"] == 0 and start["world_size"] == 1 and start["files"][f"{workshop.prefix}.bin"] > 0
    assert rerun([str(save)]) == 0
    assert shlex.split(capsys.readouterr().out)[-len(workshop.arguments("alone")):][-2:] == ["--save-interval", "3"]


def test_learns_and_writes_what_the_design_says(workshop, alone):
    first, last = steps(alone)[0], steps(alone)[-1]
    assert set(first) == {*STEP, "iteration", "tokens_per_second", "step_seconds"}
    assert first["lm_loss"] == pytest.approx(6.24, abs=0.2)  # ln 512
    assert last["lm_loss"] < first["lm_loss"] - 0.05
    assert [record["iteration"] for record in validations(alone)] == [0, 3, 6]
    assert (workshop.directory / "alone" / "latest_checkpointed_iteration.txt").read_text() == "6\n"


@pytest.mark.slow
def test_all_validation_data_whatever_the_layout(workshop):
    """Rows that fill up the last batch are no text: on several data ranks, whole micro-batches of some. Weights are
    compared after each step, and agree. How long the documents at the corpus's end are, changes with the Python.
    """
    for part in (10, 20, 25, 30, 40):
        options = f"--full-validation --split {1000 - part},{part},0 --train-iters 2 " \
                  "--check-weight-hash-across-dp-replicas-interval 1"
        alone = workshop.run(1, workshop.arguments(f"whole-{part}", *options.split()))
        found = re.search(r"valid data: .* ([\d,]+) samples of 32 tokens are 1.00 epochs", alone.output)
        if int(found.group(1).replace(",", "")) % 16 not in (0, 15):
            break
    else:
        pytest.fail("no micro-batch is without text")
    job = workshop.run(4, workshop.arguments("shared-whole", *options.split(), *(
        "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --log-params-norm").split()))
    assert job.status == 0 and job.output.count("all ranks have the same weights") == 2, job.output
    assert_same_run(workshop.metrics("shared-whole"), workshop.metrics(f"whole-{part}"))


@pytest.mark.slow
def test_any_layout_continues_any_other(workshop, alone):
    """Three steps on slices of tensors and experts, three more on two stages in turns: one rank's numbers."""
    halfway = ("--load", str(workshop.directory / "moved"))
    first = workshop.train(4, "moved", "--exit-interval", "3", *(
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 2").split())
    assert [record["iteration"] for record in steps(first)] == [1, 2, 3]
    assert_same_run(workshop.train(4, "moved", *halfway, *(
        "--pipeline-model-parallel-size 2 --pipeline-schedule DualPipeV --expert-model-parallel-size 2 "
        "--overlap-moe-expert-parallel-comm").split()), alone)
    ours, theirs = (read_history(workshop.directory / run / "expert_load.jsonl").violations
                    for run in ("moved", "alone"))
    for (iteration, violation), (same, expected) in zip(ours, theirs, strict=True):
        assert iteration == same and violation == pytest.approx(expected, abs=0.05)  # of 128 tokens an expert has
    starts = json.loads((workshop.directory / "moved" / "run.json").read_text())["starts"]
    assert [(start["iteration"], start["layout"]["pp"]) for start in starts] == [(0, 1), (3, 2)]


@pytest.mark.slow
def test_context_parallel_grouped_experts_and_packing(workshop):
    """A blend against one rank with the same documents, which drops the same tokens; the bytes of each level, and
    losses by source, are written.
    """
    common = ["--data-path", "0.3", str(workshop.prefix), "0.7", str(workshop.prefix), *(
        "--reset-attention-mask --moe-expert-capacity-factor 1.0 --moe-token-drop-policy position").split()]
    packed = workshop.train(1, "packed", *common)
    shared = workshop.train(4, "shared", *common, "--reset-position-ids", *(
        "--context-parallel-size 2 --expert-model-parallel-size 4 --moe-token-dispatcher-type grouped "
        "--moe-ranks-per-node 2").split())
    assert_same_run(shared, packed)
    for record in steps(shared):
        assert sum(record["source_tokens"].values()) == 16 * 32
        assert sum(record["source_tokens"][name] * loss for name, loss in record["source_loss"].items()) == (
            pytest.approx(record["lm_loss"] * 16 * 32, rel=1e-6))
    assert set(validations(shared)[0]["validation_source_loss"]) == {workshop.prefix.name, workshop.prefix.name + "#2"}
    assert all(record["moe_bytes_within_node"] > 0 and record["moe_bytes_across_nodes"] > 0 for record in steps(shared))
    dropped = [[record["moe_dropped_fraction"] for record in steps(run)] for run in (packed, shared)]
    assert dropped[0] == pytest.approx(dropped[1], abs=2e-3) and all(0 < part < 0.5 for part in dropped[0])


def test_exit_interval_recompute_ramp_and_bf16(workshop):
    """The options that change when and how a step is computed, all in one short run."""
    metrics = workshop.train(
        1, "options", "--bf16", "--exit-interval", "4", "--recompute-granularity", "selective", "--rampup-batch-size",
        "4", "4", "24", "--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", "0.01",
        "--lr-decay-style", "deepseek-v3", "--profile", "--profile-step-start", "1", "--profile-step-end", "2",
        "--tensorboard-dir", str(workshop.directory / "tensorboard"))
    assert [record["tokens"] // 32 for record in steps(metrics)] == [4, 4, 8, 12]  # a rise every 8 samples
    assert all(record["balance_loss"] > 0 for record in steps(metrics))
    assert list((workshop.directory / "tensorboard").iterdir())
    assert list((workshop.directory / "options" / "profile").glob("rank_00000*.json.gz"))
    assert (workshop.directory / "options" / "latest_checkpointed_iteration.txt").read_text() == "4\n"


def bad_inputs(workshop) -> dict[str, tuple[list[str], str]]:
    """Arguments to add, and what the one line must name."""
    truncated = workshop.directory / "truncated"
    shutil.copy(f"{workshop.prefix}.idx", f"{truncated}.idx")
    truncated.with_suffix(".bin").write_bytes(workshop.prefix.with_suffix(".bin").read_bytes()[:-100])
    return {
        "missing data": (["--data-path", "nowhere"], "--data-path nowhere"),
        "truncated data": (["--data-path", str(truncated)], str(truncated)),
        "small vocabulary": (["--vocab-size", "200"], "vocab_size 200"),
        "other architecture": (["--hidden-size", "64", "--load", str(workshop.directory / "alone")], "hidden_size 32"),
        "no number": (["--lr", "fast"], "--lr"),
        "heads": (["--num-attention-heads", "0"], "--num-attention-heads"),
    }


@pytest.mark.parametrize("kind", ["missing data", "truncated data", "small vocabulary", "other architecture",
                                  "no number", "heads"])
def test_refuses_bad_input_in_one_line(workshop, alone, kind):
    more, named = bad_inputs(workshop)[kind]
    job = workshop.run(1, workshop.arguments("refused", *more))
    lines = job.output.strip().splitlines()
    assert job.status == 2 and len(lines) == 1, job.output
    assert lines[0].startswith("pretrain_deepseek.py: error: ") and named in lines[0]
    assert not (workshop.directory / "refused").exists()


def test_refuses_once_for_all_ranks(workshop):
    job = workshop.run(2, workshop.arguments("refused", "--data-path", "nowhere"))
    said = [line for line in job.output.splitlines() if line.startswith("pretrain_deepseek.py: error: ")]
    assert len(said) == 1 and job.status == 2


def test_a_checkpoint_with_a_missing_tensor_is_refused(workshop, alone):
    """Nothing is dropped in silence: a model with one MTP module less does not load."""
    config = json.loads(workshop.config.read_text()) | {"num_nextn_predict_layers": 0}
    other = workshop.directory / "no_mtp.json"
    other.write_text(json.dumps(config))
    job = workshop.run(1, workshop.arguments("refused", "--model", str(other), "--load",
                                             str(workshop.directory / "alone")))
    assert job.status == 2 and "holds 1 Multi-Token Prediction module, the model has 0" in job.output
