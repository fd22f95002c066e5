"""Objectives against plain autograd over a plain model, and scores against its logits, on one process.

Layouts are compared with one process in tests/parallel/test_layouts.py, which has the same objectives.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference_model import ReferenceModel
from reference_routing import choose
from small_models import (
    V3_SMALL,
    enliven,
    gradients_of,
    random_batch,
    relative_error,
    training_batch,
    weights_of,
    whole_stage,
)

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.finetuning.objectives import HeldOut, SampleMean
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.model.step import Contribution
from megatron_deepseek.settings import LossSettings, OptimizerSettings
from megatron_deepseek.training.acceptance import Validation
from megatron_deepseek.training.next_token import NextToken
from megatron_deepseek.training.objective import Objective
from megatron_deepseek.training.trainer import TrainingSpec, Trainer

from objectives import (
    BETA,
    ENTROPY_SCALE,
    REFERENCE,
    TEACHER_IDS,
    TEACHER_LOG_PROBABILITIES,
    Distillation,
    PairedSigmoid,
    inputs_of,
)

LENGTH, ROWS, DEPTHS = 8, 4, 2
CONFIG = replace(V3_SMALL, num_nextn_predict_layers=DEPTHS)
EXACT = 1e-10  # float64 sums in another order


def trainer(meshes, objective: Objective | None, micro_batch_size: int = 2, chunk_size: int | None = None) -> Trainer:
    build = BuildOptions(precision=Precision(torch.float64),
                         loss=LossSettings(mtp_loss_scaling_factor=0.3, loss_chunk_size=chunk_size))
    made = Trainer(TrainingSpec(CONFIG, (whole_stage(CONFIG),), "1F1B", LENGTH, micro_batch_size, build,
                        OptimizerSettings(clip_grad=0.0)), meshes, objective)
    enliven(made.stages[0])
    return made


def reference_of(made: Trainer) -> ReferenceModel:
    table_2SD = rope_table(CONFIG, LENGTH, torch.device("cpu"), torch.float64)
    return ReferenceModel(CONFIG, weights_of(made.stages[0]), table_2SD, CONFIG.qk_head_dim**-0.5)


def token_losses(reference: ReferenceModel, batch: Batch) -> list[torch.Tensor]:
    """Of each depth the losses [B, S - depth] of labels that are there; rows are one document."""
    whole = torch.cat([batch.tokens_BS, batch.labels_BS[:, -1:]], 1)
    return [F.cross_entropy(logits[:, :LENGTH - depth].flatten(0, 1), whole[:, 1 + depth:].flatten(),
                            reduction="none").view(len(whole), -1)
            for depth, logits in enumerate(reference.logits(whole, LENGTH))]


def compare(made: Trainer, reference: ReferenceModel) -> None:
    expected = reference.gradients()
    for name, gradient in gradients_of(made.stages[0]).items():
        if gradient is None:
            assert not expected[name].any(), name
        else:
            assert relative_error(gradient, expected[name]) < EXACT, name


def fractional(seed: int = 0) -> Batch:
    """Labels that count for 0, 1/2 and 1."""
    tokens, labels, mask = random_batch(CONFIG, ROWS, LENGTH, seed)
    return training_batch(tokens, labels, mask * (0.5 + 0.5 * (tokens % 2)))


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_weights_of_labels_may_be_fractions(meshes, micro_batch_size):
    """The weighted mean of each depth; the number of labels counts those with any weight."""
    made, batch = trainer(meshes, NextToken(DEPTHS, 0.3), micro_batch_size), fractional()
    result, reference = made.train_step(batch, learning_rate=0.0), reference_of(made)
    losses = [(loss * batch.weights_BS[:, depth:]).sum() / batch.weights_BS[:, depth:].sum()
              for depth, loss in enumerate(token_losses(reference, batch))]
    (losses[0] + 0.3 / DEPTHS * sum(losses[1:])).backward()
    assert result.losses.num_labels == int((batch.weights_BS > 0).sum())
    assert result.losses.lm_loss == pytest.approx(losses[0].item(), rel=EXACT)
    assert result.losses.mtp_loss == pytest.approx([loss.item() for loss in losses[1:]], rel=EXACT)
    compare(made, reference)


@pytest.mark.parametrize("depths", [0, DEPTHS])
def test_mean_over_samples(meshes, depths):
    """Rows as samples, one of them without labels; MTP modules that are not asked get no gradient."""
    made, batch = trainer(meshes, SampleMean(depths, 0.5 * depths)), fractional()
    batch.weights_BS[2] = 0
    result, reference = made.train_step(batch, learning_rate=0.0), reference_of(made)
    expected = []
    for depth, loss_BS in enumerate(token_losses(reference, batch)[:1 + depths]):
        weights_BS = batch.weights_BS[:, depth:]
        expected.append(sum((loss_BS[row] * weights_BS[row]).sum() / weights_BS[row].sum() for row in (0, 1, 3)) / 3)
    (expected[0] + 0.5 * sum(expected[1:])).backward()
    assert list(result.losses.reports.values()) == pytest.approx([loss.item() for loss in expected], rel=EXACT)
    compare(made, reference)
    unused = {name for name, gradient in gradients_of(made.stages[0]).items() if gradient is None}
    assert bool(unused) == (depths == 0) and all(name.startswith(("model.layers.2.", "model.layers.3."))
                                                 for name in unused)


def test_held_out_losses_count_the_labels_that_are_likeliest(meshes):
    """By definition; each token's likeliest next one is that of the logits, and nothing is trained."""
    made, batch = trainer(meshes, SampleMean(DEPTHS, 0.3), chunk_size=3), fractional()
    found, reference = made.evaluate(batch, HeldOut(DEPTHS)), reference_of(made)
    losses = [(loss * batch.weights_BS[:, depth:]).sum() / batch.weights_BS[:, depth:].sum()
              for depth, loss in enumerate(token_losses(reference, batch))]
    whole = torch.cat([batch.tokens_BS, batch.labels_BS[:, -1:]], 1)
    best_BS = reference.logits(whole, LENGTH)[0].argmax(-1)
    labelled = torch.where(torch.arange(LENGTH) % 2 == 0, best_BS, batch.labels_BS)
    assert found.lm_loss == pytest.approx(losses[0].item(), rel=EXACT)
    assert found.mtp_loss == pytest.approx([loss.item() for loss in losses[1:]], rel=EXACT)
    assert found.correct == int(((best_BS == batch.labels_BS) & (batch.weights_BS > 0)).sum())
    assert torch.equal(made.likeliest(batch), best_BS)
    right = made.evaluate(replace(batch, labels_BS=labelled), HeldOut())
    assert right.correct == int(((best_BS == labelled) & (batch.weights_BS > 0)).sum()) > found.correct
    assert all(parameter.grad is None for parameter in made.stages[0].parameters())


def test_a_draft_is_accepted_where_the_main_model_takes_the_same_token(meshes):
    """By definition, position by position; a head of three live rows makes agreement likely. Labels that do not count
    are no drafts.
    """
    made, batch = trainer(meshes, NextToken(DEPTHS, 0.3), chunk_size=3), fractional()
    made.stages[0].lm_head.weight.to_local().detach()[3:] = 0
    found, reference = made.evaluate(batch, Validation(DEPTHS)), reference_of(made)
    whole = torch.cat([batch.tokens_BS, batch.labels_BS[:, -1:]], 1)
    likeliest = [logits.argmax(-1).tolist() for logits in reference.logits(whole, LENGTH)]
    for depth in range(1, 1 + DEPTHS):
        agree = [likeliest[depth][row][place] == likeliest[0][row][place + depth] for row in range(ROWS)
                 for place in range(LENGTH - depth) if batch.weights_BS[row, place + depth]]
        assert 0 < sum(agree) < len(agree) == found.mtp_labels[depth - 1]
        assert found.mtp_acceptance[depth - 1] == pytest.approx(sum(agree) / len(agree))
    assert made.evaluate(batch, Validation()).mtp_acceptance == ()


def test_the_example_of_the_docs(meshes):
    page = (Path(__file__).parents[3] / "docs" / "objectives.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if block.startswith("class"))
    names = {"Objective": Objective, "Contribution": Contribution}
    exec(code, names)
    found, expected = (trainer(meshes, objective).train_step(fractional(), learning_rate=0.0)
                       for objective in (names["MeanOverSamples"](), SampleMean()))
    assert found.losses.reports == {"sample_loss": expected.losses.lm_loss}
    assert found.grad_norm == expected.grad_norm


def test_pairs_of_rows(meshes):
    made, batch = trainer(meshes, PairedSigmoid()), fractional()
    given_BS = -3 * torch.rand(ROWS, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    result = made.train_step(replace(batch, per_token={REFERENCE: given_BS}), learning_rate=0.0)
    reference = reference_of(made)
    sums_B = ((-token_losses(reference, batch)[0] - given_BS) * batch.weights_BS).sum(1)
    loss = sum(F.softplus(-BETA * (sums_B[i] - sums_B[i + 1])) for i in (0, 2)) / 2
    loss.backward()
    assert result.losses.reports["dpo_loss"] == pytest.approx(loss.item(), rel=EXACT)
    assert result.losses.reports["accuracy"] == ((sums_B[0] > sums_B[1]).item() + (sums_B[2] > sums_B[3]).item()) / 2
    compare(made, reference)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_distillation_reads_logits(meshes, chunk_size):
    """A teacher's three likeliest ids, and the entropy, by definition; also when logits are made by chunks."""
    made, batch = trainer(meshes, Distillation(), chunk_size=chunk_size), fractional()
    teacher = inputs_of("distillation", ROWS, 0, LENGTH, CONFIG.vocab_size)
    result = made.train_step(replace(batch, per_token=teacher), learning_rate=0.0)
    reference = reference_of(made)
    whole = torch.cat([batch.tokens_BS, batch.labels_BS[:, -1:]], 1)
    log_BSV = reference.logits(whole, LENGTH)[0].log_softmax(-1)
    q_BSK = teacher[TEACHER_LOG_PROBABILITIES].exp()
    divergence_BS = (q_BSK * (q_BSK.log() - log_BSV.gather(-1, teacher[TEACHER_IDS]))).sum(-1)
    entropy_BS = -(log_BSV.exp() * log_BSV).sum(-1)
    number = (batch.weights_BS > 0).sum()
    divergence, entropy = ((x_BS * batch.weights_BS).sum() / number for x_BS in (divergence_BS, entropy_BS))
    (divergence - ENTROPY_SCALE * entropy).backward()
    assert result.losses.reports == pytest.approx({"divergence": divergence.item(), "entropy": entropy.item()},
                                                  rel=EXACT)
    compare(made, reference)


def test_scores_are_log_probabilities_and_choices(meshes):
    """In the order of the rows, over micro-batches; MTP modules take no part, and no weight has a gradient."""
    made, batch = trainer(meshes, None), fractional()
    scores, reference = made.score(batch, experts=True), reference_of(made)
    expected_BS = -token_losses(reference, batch)[0]
    torch.testing.assert_close(scores.log_probabilities_BS, expected_BS.detach(), rtol=EXACT, atol=EXACT)
    assert scores.experts.keys() == {"model.layers.1.mlp"}
    bias = reference.weights["model.layers.1.mlp.gate.e_score_correction_bias"].tolist()
    for scores_SE, chosen_SK in zip(reference.scores[0].tolist(), scores.experts["model.layers.1.mlp"].tolist()):
        assert [sorted(chosen) for chosen in chosen_SK] == [sorted(choose(each, bias, CONFIG)) for each in scores_SE]
    assert all(parameter.grad is None for parameter in made.stages[0].parameters())
    assert made.score(batch).experts == {}


def test_what_a_batch_lacks_is_named(meshes):
    with pytest.raises(ValueError, match="PairedSigmoid reads reference_log_probabilities, which the batch does not"):
        trainer(meshes, PairedSigmoid()).train_step(fractional(), learning_rate=0.0)
    with pytest.raises(ValueError, match="--micro-batch-size 1 is not a multiple of the 2 rows that PairedSigmoid"):
        batch = replace(fractional(), per_token={REFERENCE: torch.zeros(ROWS, LENGTH)})
        trainer(meshes, PairedSigmoid(), micro_batch_size=1).train_step(batch, learning_rate=0.0)


def test_an_objective_reports_what_it_says(meshes):
    """A name that is not announced would be lost where another rank holds the head."""
    class Careless(SampleMean):
        def reported(self, rows):
            return ("loss",)

    with pytest.raises(AssertionError, match="lm_loss"):
        trainer(meshes, Careless()).train_step(fractional(), learning_rate=0.0)
