"""Divergences from a teacher: hand-worked numbers, torch's kl_div and TRL's formula in float64, and gradients."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference_model import ReferenceModel
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
from small_trainers import NO_CLIPPING, SEQ_LENGTH

from megatron_deepseek.fine_tuning_settings import DistillationSettings
from megatron_deepseek.finetuning.distillation.losses import divergence_of, divergence_of_top
from megatron_deepseek.finetuning.distillation.objective import (
    IDS,
    LOG_PROBABILITIES,
    REST,
    STATES,
    Distillation,
)
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.head import OutputHead
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary_divergence import vocabulary_divergence
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits
from megatron_deepseek.settings import LossSettings
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

NOWHERE = DistillationSettings(None)
T, V, H = 7, 13, 5
LOSSES = ("forward-kl", "reverse-kl", "jsd")
EVERY = [(loss, temperature, beta) for loss in LOSSES for temperature in (1.0, 2.0, 0.5)
         for beta in ((0.2, 0.5, 0.9) if loss == "jsd" else (0.5,))]


@pytest.fixture
def tp(meshes) -> TensorParallel:
    return TensorParallel(meshes.tp, sequence_parallel=False)


def settings_of(loss: str, temperature: float = 1.0, beta: float = 0.5, **more) -> DistillationSettings:
    return replace(NOWHERE, kd_loss=loss, kd_temperature=temperature, kd_jsd_beta=beta, **more)


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ours(student: torch.Tensor, teacher: torch.Tensor, settings: DistillationSettings, tp: TensorParallel
         ) -> torch.Tensor:
    both = (VocabularyLogits(each, tp).at_temperature(settings.kd_temperature) for each in (student, teacher))
    return vocabulary_divergence(*both, divergence_of(settings))


def by_kl_div(student: torch.Tensor, teacher: torch.Tensor, settings: DistillationSettings) -> torch.Tensor:
    """The formula of TRL's generalized_jsd_loss, in torch's kl_div(input, target) = KL(target | input)."""
    log_p, log_q = (F.log_softmax(each / settings.kd_temperature, -1) for each in (student, teacher))

    def kl(log_of, log_from):
        return F.kl_div(log_from, log_of, log_target=True, reduction="none").sum(-1)

    if settings.kd_loss == "jsd":
        beta = settings.kd_jsd_beta
        log_m = torch.stack([log_p + math.log(1 - beta), log_q + math.log(beta)]).logsumexp(0)
        return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    return kl(log_q, log_p) if settings.kd_loss == "forward-kl" else kl(log_p, log_q)


# Numbers --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, temperature, expected", [("forward-kl", 1, 0.266217), ("reverse-kl", 1, 0.308994),
                                                         ("forward-kl", 2, 0.078421), ("jsd", 1, 0.068712)])
def test_worked_numbers(tp, loss, temperature, expected):
    """A teacher's logits 2, 1, 0 and a student's 1, 1, 1."""
    teacher, student = (torch.tensor([each], dtype=torch.float64) for each in ((2.0, 1.0, 0.0), (1.0, 1.0, 1.0)))
    found = ours(student, teacher, settings_of(loss, temperature), tp)
    assert found.item() == pytest.approx(expected, abs=5e-7)


def test_factors_of_the_loss():
    """0.078421 at temperature 2 counts 0.313684 if the temperature's square is asked for."""
    assert settings_of("jsd", 2.0).factor == 1.0
    assert 0.078421 * settings_of("forward-kl", 2.0, kd_temperature_squared=True).factor == pytest.approx(0.313684)
    assert settings_of("jsd", 2.0, kd_temperature_squared=True, kd_ratio=0.25).factor == 1.0


@pytest.mark.parametrize("loss, temperature, beta", EVERY)
def test_against_torch(tp, loss, temperature, beta):
    """Values, and the gradient, with every token weighted differently."""
    settings, teacher = settings_of(loss, temperature, beta), random_logits(1, T, V)
    student = random_logits(2, T, V).requires_grad_()
    found, expected = (each(student, teacher, settings, *more) for each, more in ((ours, (tp,)), (by_kl_div, ())))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    weights = torch.linspace(0, 2, T, dtype=torch.float64)
    gradients = [torch.autograd.grad((each * weights).sum(), student)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_against_trl(tp, loss):
    """TRL's own function, where it is installed: its sum over tokens."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = random_logits(2, 1, T, V), random_logits(1, 1, T, V)
    beta = {"forward-kl": 0.0, "reverse-kl": 1.0, "jsd": 0.3}[loss]
    expected = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=0.9, reduction="sum")
    found = ours(student[0], teacher[0], settings_of(loss, 0.9, beta), tp).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_by_chunks_through_the_head(tp, loss, chunk_size):
    """Gradients of the student's state and head; in the backward the teacher's logits are made again."""
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 4, H), (V, H), (2, 4, 3), (V, 3)
    state, weight, teacher_state, teacher_weight = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    inputs = state.requires_grad_(), weight.requires_grad_()
    settings = settings_of(loss, 1.5, 0.3)
    head = OutputHead(tp, lambda: weight, chunk_size=chunk_size)
    found = head.for_chunks(state, lambda logits, of: ours(logits.local_Tv, F.linear(of, teacher_weight), settings, tp),
                            teacher_state)
    expected = by_kl_div(F.linear(state, weight), F.linear(teacher_state, teacher_weight), settings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for one, other in zip(*(torch.autograd.grad((each**2).sum(), inputs) for each in (found, expected))):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_ids_without_probability(tp, loss):
    """Of ids that both leave out nothing is counted, and ids that one alone leaves out give no NaN."""
    student, teacher = random_logits(2, T, V), random_logits(1, T, V)
    settings = settings_of(loss)
    both = tuple(torch.cat([each, torch.full((T, 2), -torch.inf)], 1) for each in (student, teacher))
    torch.testing.assert_close(ours(*both, settings, tp), ours(student, teacher, settings, tp))
    padded = [VocabularyLogits(torch.cat([each, random_logits(9, T, 2)], 1), tp).of_first(V)
              for each in (student, teacher)]
    torch.testing.assert_close(vocabulary_divergence(*padded, divergence_of(settings)),
                               ours(student, teacher, settings, tp))
    one = (student.requires_grad_(), both[1][:, 2:])
    found = ours(*one, settings, tp)
    assert not found.isnan().any() and not torch.autograd.grad(found.sum(), student)[0].isnan().any()


# Known ids alone ------------------------------------------------------------------------------------------------------

def known(teacher: torch.Tensor, number: int, temperature: float, tp: TensorParallel) -> tuple[torch.Tensor, ...]:
    logits = VocabularyLogits(teacher, tp).at_temperature(temperature)
    ids = logits.top(number)
    return ids, logits.log_probabilities(ids), logits.log_rest(ids)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("number", [1, 4, V - 1, V])
def test_known_ids_and_the_rest(tp, loss, number):
    """The divergence of K + 1 outcomes, with autograd; that of the whole vocabulary for K = V."""
    settings, teacher = settings_of(loss, 1.5, 0.3), random_logits(1, T, V)
    student = random_logits(2, T, V).requires_grad_()
    ids, log_q, log_rest = known(teacher, number, 1.5, tp)
    logits = VocabularyLogits(student, tp).at_temperature(1.5)
    found = divergence_of_top(logits, ids, log_q, log_rest, divergence_of(settings))
    if number == V:
        expected = by_kl_div(student, teacher, settings)
    else:
        p, q = (F.softmax(each / 1.5, -1).gather(-1, ids) for each in (student, teacher))
        outcomes = [torch.cat([each, 1 - each.sum(-1, keepdim=True)], -1).log() for each in (p, q)]
        expected = by_kl_div(*outcomes, replace(settings, kd_temperature=1.0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    assert (found <= by_kl_div(student, teacher, settings) + 1e-12).all()


def test_the_likeliest_come_first(tp):
    teacher = random_logits(1, T, V)
    ids, log_q, log_rest = known(teacher, 3, 1.0, tp)
    probabilities = teacher.softmax(-1)
    assert ids.tolist() == probabilities.argsort(-1, descending=True)[:, :3].tolist()
    torch.testing.assert_close(log_q.exp().sum(-1) + log_rest.exp(), torch.ones(T, dtype=torch.float64))


# The objective --------------------------------------------------------------------------------------------------------

CONFIG = replace(V3_SMALL, num_nextn_predict_layers=1)
KNOWN = CONFIG.vocab_size - 2  # ids that both models know
EXACT = 1e-9  # float64 sums in another order


def reference_of(made: Trainer) -> ReferenceModel:
    table_2SD = rope_table(CONFIG, SEQ_LENGTH, torch.device("cpu"), torch.float64)
    return ReferenceModel(CONFIG, weights_of(made.stages[0]), table_2SD, CONFIG.qk_head_dim**-0.5)


def compare(made: Trainer, reference: ReferenceModel) -> None:
    expected = reference.gradients()
    for name, gradient in gradients_of(made.stages[0]).items():
        assert relative_error(gradient, expected[name]) < EXACT, name


class Head:
    """A teacher of one matrix, whose last ids are padding."""

    num_ids = KNOWN

    def __init__(self):
        self.weight = random_logits(5, CONFIG.vocab_size, H)

    def logits(self, states_TH: torch.Tensor) -> torch.Tensor:
        return F.linear(states_TH, self.weight)


@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("is_cached", [False, True])
def test_objective_against_autograd(meshes, tp, ratio, is_cached):
    """The mixture, MTP's part whatever the ratio, and every gradient, against a plain forward."""
    settings, head = settings_of("reverse-kl", 1.3, kd_ratio=ratio, kd_temperature_squared=True), Head()
    objective = Distillation(settings, None if is_cached else head, 1, 0.3, num_ids=KNOWN * is_cached)
    build = BuildOptions(precision=Precision(torch.float64), loss=LossSettings(balance_type="none"))
    made = Trainer(TrainingSpec(CONFIG, (whole_stage(CONFIG),), "1F1B", SEQ_LENGTH, 2, build, NO_CLIPPING), meshes,
                   objective)
    enliven(made.stages[0])
    tokens, labels, mask = random_batch(CONFIG, 4, SEQ_LENGTH, 0)
    states = random_logits(6, 4, SEQ_LENGTH, H)
    teacher = F.linear(states, head.weight)
    inputs = {STATES: states}
    if is_cached:
        ids, log_q, log_rest = known(teacher[..., :KNOWN].flatten(0, 1), KNOWN, 1.3, tp)
        inputs = {IDS: ids.int(), LOG_PROBABILITIES: log_q, REST: log_rest}
        inputs = {name: each.unflatten(0, (4, SEQ_LENGTH)) for name, each in inputs.items()}
    batch = replace(training_batch(tokens, labels, mask), per_token=inputs)
    found = made.train_step(batch, learning_rate=0.0).losses
    reference = reference_of(made)
    expected_lm, expected_mtp = reference.losses(torch.cat([tokens, labels[:, -1:]], 1), mask)
    logits = reference.logits(torch.cat([tokens, labels[:, -1:]], 1), SEQ_LENGTH)[0]
    expected_kd = (by_kl_div(logits[..., :KNOWN], teacher[..., :KNOWN], settings) * mask).sum() / mask.sum()
    (ratio * 1.3**2 * expected_kd + (1 - ratio) * expected_lm + 0.3 * expected_mtp).backward()
    assert found.objective["kd_loss"] == pytest.approx(expected_kd.item(), rel=EXACT)
    assert found.lm_loss == pytest.approx(expected_lm.item(), rel=EXACT)
    mixture = ratio * 1.69 * expected_kd.item() + (1 - ratio) * expected_lm.item()
    assert found.trained == ("distill_loss", pytest.approx(mixture, rel=EXACT))
    compare(made, reference)
