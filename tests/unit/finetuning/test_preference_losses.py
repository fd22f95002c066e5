"""The losses of preference tuning: the papers' numbers, and whole objectives against plain autograd in float64.

The reference below is written from the papers, answer by answer: no packing, no padding, no shared code.
"""

import math
from dataclasses import replace

import pytest
import torch
from preference_data import labelled, pairs, random_sums, rows_of, write_rows
from reference_model import ReferenceModel
from small_models import V3_SMALL, enliven, gradients_of, load, relative_error, weights_of, whole_stage

from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.fine_tuning_settings import PreferenceSettings
from megatron_deepseek.finetuning.preference.completion import Completion, weighted_scores
from megatron_deepseek.finetuning.preference.inputs import MismatchedSampler, PreferenceSampler
from megatron_deepseek.finetuning.preference.losses import PAIR_LOSSES, PairScores, kto, log_of_rest, rewards
from megatron_deepseek.finetuning.preference.objectives import REFERENCE, preference_objective
from megatron_deepseek.finetuning.units import Units
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.settings import LoraSettings, LossSettings, OptimizerSettings
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

LENGTH = 32
CONFIG = replace(V3_SMALL, vocab_size=512)
EXACT = 1e-9  # float64 sums in another order


def scores(policy, reference=(0.0, 0.0), lengths=(1.0, 1.0)) -> PairScores:
    return PairScores(*(torch.tensor([each], dtype=torch.float64) for each in (policy, reference, lengths)))


def pair_loss(objective: str, made: PairScores, **options) -> float:
    return PAIR_LOSSES[objective](made, PreferenceSettings(objective, **options)).item()


def test_numbers_of_dpo_and_its_kin():
    """Log p of -10 and -14, of the reference -11 and -13: a margin of 2, times beta 0.1."""
    example = scores((-10.0, -14.0), (-11.0, -13.0))
    assert pair_loss("dpo", example) == pytest.approx(0.598139, abs=5e-7)
    assert pair_loss("dpo", example, label_smoothing=0.25) == pytest.approx(0.598139 + 0.25 * 0.2, abs=5e-7)
    assert pair_loss("ipo", example) == 9.0
    assert pair_loss("hinge", example) == pytest.approx(0.8)
    assert rewards(example, PreferenceSettings())[0].tolist() == pytest.approx([0.1, -0.1])


def test_ipo_takes_means_over_tokens():
    """Of 2 and 4 tokens: 1/2 and -1/4 more than the reference's."""
    assert pair_loss("ipo", scores((-10.0, -14.0), (-11.0, -13.0), (2.0, 4.0))) == pytest.approx((0.75 - 5)**2)


def test_numbers_without_a_reference():
    """Means of log p of log 0.5 and log 0.2: odds 1 and 1/4."""
    example = scores((2 * math.log(0.5), 3 * math.log(0.2)), lengths=(2.0, 3.0))
    assert pair_loss("orpo", example) == pytest.approx(0.1 * math.log(1 + 1 / 4))
    margin = 2.0 * math.log(2.5) - 0.5
    assert pair_loss("simpo", example, beta=2.0) == pytest.approx(math.log(1 + math.exp(-margin)))
    assert rewards(example, PreferenceSettings("simpo", 2.0))[0].tolist() == pytest.approx(
        [2 * math.log(0.5), 2 * math.log(0.2)])


def test_numbers_of_kto():
    """A good answer 3 above the reference, a bad one 1 above it, z of 1: sigmoid(+-0.1 * 2) and sigmoid(0)."""
    settings = PreferenceSettings("kto", desirable_weight=1.0, undesirable_weight=0.25)
    found = kto(torch.tensor([3.0, 1.0], dtype=torch.float64), torch.tensor([1.0, -1.0]), 1.0, settings)
    assert found.tolist() == pytest.approx([1 - 1 / (1 + math.exp(-0.2)), 0.25 * 0.5])


@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.9, 1 - 1e-12])
def test_log_of_the_rest_is_accurate(p):
    log_p = torch.tensor(math.log1p(-1e-12) if p > 0.99 else math.log(p), dtype=torch.float64)
    expected = math.log(1e-12) if p > 0.99 else math.log1p(-p)
    assert log_of_rest(log_p).item() == pytest.approx(expected, rel=1e-9)
    assert math.isfinite(log_of_rest(torch.zeros((), dtype=torch.float64)).item())


# Whole objectives -----------------------------------------------------------------------------------------------------


def trainer(meshes, settings: PreferenceSettings, config=CONFIG, lora: LoraSettings | None = None) -> Trainer:
    build = BuildOptions(precision=Precision(torch.float64), loss=LossSettings(balance_type="none"), lora=lora)
    made = Trainer(TrainingSpec(config, (whole_stage(config),), "1F1B", LENGTH, 1, build,
                                OptimizerSettings(clip_grad=0.0)), meshes, preference_objective(settings))
    enliven(made.stages[0])
    return made


def reference_of(made: Trainer) -> ReferenceModel:
    table_2SD = rope_table(CONFIG, LENGTH, torch.device("cpu"), torch.float64)
    return ReferenceModel(CONFIG, weights_of(made.stages[0]), table_2SD, CONFIG.qk_head_dim**-0.5)


def log_probabilities(reference: ReferenceModel, ids, weights) -> tuple[torch.Tensor, int]:
    """The sum of log p over an answer's tokens, and their number."""
    ids, counts = torch.tensor(ids.tolist()), torch.tensor(weights[1:].tolist())
    logits = reference.logits(ids[None], LENGTH)[0][0, :len(ids) - 1]
    return (logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]] * counts).sum(), int(counts.sum())


def expected_pair(objective: str, settings: PreferenceSettings, a, b, of_a: float, of_b: float) -> torch.Tensor:
    """The loss of one pair: sums and lengths of both answers, and the reference's sums."""
    (chosen, n), (rejected, m) = a, b
    beta, ratio = settings.beta, (chosen - of_a) - (rejected - of_b)
    odds_c, odds_r = ((x / k).exp() / (1 - (x / k).exp()) for x, k in (a, b))
    return {"dpo": lambda: -0.9 * (beta * ratio).sigmoid().log() - 0.1 * (-beta * ratio).sigmoid().log(),
            "hinge": lambda: (1 - beta * ratio).clamp(min=0),
            "ipo": lambda: ((chosen - of_a) / n - (rejected - of_b) / m - 1 / (2 * beta))**2,
            "orpo": lambda: -beta * (odds_c / odds_r).log().sigmoid().log(),
            "simpo": lambda: -(beta * (chosen / n - rejected / m) - settings.simpo_gamma).sigmoid().log()}[objective]()


@pytest.mark.parametrize("objective", ["dpo", "hinge", "ipo", "orpo", "simpo"])
def test_pairs_against_autograd(meshes, tmp_path, objective):
    """Packed pairs and a blank row, with a term for the chosen answers' likelihood: losses, rewards, every gradient."""
    smoothing, alpha = (0.1 if objective == "dpo" else 0.0), (0.0 if objective == "orpo" else 0.3)
    settings = PreferenceSettings(objective, 0.7, smoothing, alpha, simpo_gamma=0.4)
    rows = rows_of(write_rows(tmp_path / "pairs.jsonl", pairs(6)), objective)
    assert rows.rows_per_epoch < 6
    made, sums = trainer(meshes, settings), random_sums(rows, 1)
    batch = PreferenceSampler(Sampler(rows, 512, ""), rows, sums).batch(0, rows.rows_per_epoch + 1, 1)
    found, reference = made.train_step(batch, learning_rate=0.0), reference_of(made)
    answers = [log_probabilities(reference, *rows.sample(0, number)) for number in range(12)]
    of = sums[0].tolist()
    losses = [expected_pair(objective, settings, answers[i], answers[i + 1], of[i], of[i + 1]) for i in range(0, 12, 2)]
    likelihood = -sum(total for total, _ in answers[::2]) / sum(number for _, number in answers[::2])
    (sum(losses) / 6 + (1.0 if objective == "orpo" else alpha) * likelihood).backward()
    reports, with_reference = found.losses.reports, objective in ("dpo", "hinge", "ipo")
    assert reports[f"{objective}_loss"] == pytest.approx((sum(losses) / 6).item(), rel=EXACT)
    assert reports["lm_loss"] == pytest.approx(likelihood.item(), rel=EXACT)
    implied = [0.7 * (total.item() - of[i] if with_reference else total.item() / n)
               for i, (total, n) in enumerate(answers)]
    assert reports["rewards_chosen"] == pytest.approx(sum(implied[::2]) / 6, rel=EXACT)
    assert reports["rewards_margin"] == pytest.approx((sum(implied[::2]) - sum(implied[1::2])) / 6, rel=EXACT)
    assert reports["rewards_accuracy"] == sum(a > b for a, b in zip(implied[::2], implied[1::2])) / 6
    compare(made, reference)


def compare(made: Trainer, reference: ReferenceModel) -> None:
    expected = reference.gradients()
    for name, gradient in gradients_of(made.stages[0]).items():
        assert relative_error(gradient, expected[name]) < EXACT, name


def test_kto_against_autograd(meshes, tmp_path):
    """An odd number of answers; z of mismatched ones, which every answer but the last has exactly one of."""
    settings = PreferenceSettings("kto", 0.7, desirable_weight=1.5, undesirable_weight=0.5)
    rows = rows_of(write_rows(tmp_path / "answers.jsonl", labelled(7)), "kto")
    made, sums, mismatched = trainer(meshes, settings), random_sums(rows, 1), random_sums(rows, 2)
    mismatched = tuple(each - 30 for each in mismatched)  # so that z is not 0
    sampler = MismatchedSampler(PreferenceSampler(Sampler(rows, 512, ""), rows, sums), rows, 512, "", mismatched)
    batch = Completion(True, False)(made, sampler.batch(0, rows.rows_per_epoch, 1))
    found, reference = made.train_step(batch, learning_rate=0.0), reference_of(made)
    ids = {number: rows.sample(0, number) for number in range(7)}
    begin = {number: int(weights.nonzero()[0][0]) for number, (_, weights) in ids.items()}
    partners = {first: second for first, second in pairs_in_rows(rows)}
    partners |= {second: first for first, second in partners.items()}
    assert len(partners) == 6
    crossed = [torch.tensor([*ids[a][0][:begin[a]], *ids[b][0][begin[b]:]]) for a, b in partners.items()]
    own = [torch.tensor([*ids[a][1][:begin[a]], *ids[b][1][begin[b]:]]) for a, b in partners.items()]
    with torch.no_grad():
        departures = [log_probabilities(reference, *each)[0].item() - mismatched[0][a]
                      for each, a in zip(zip(crossed, own), partners)]
    z = max(0.0, sum(departures) / 6)
    assert z > 1
    losses, implied = [], {True: [], False: []}
    for number in range(7):
        ratio = log_probabilities(reference, *ids[number])[0] - sums[0][number]
        good = number % 3 > 0
        losses.append((1.5 if good else 0.5) * (1 - (0.7 * (ratio - z) * (1 if good else -1)).sigmoid()))
        implied[good].append(0.7 * ratio.item())
    (sum(losses) / 7).backward()
    assert found.losses.reports["kl"] == pytest.approx(z, rel=EXACT)
    assert found.losses.reports["kto_loss"] == pytest.approx((sum(losses) / 7).item(), rel=EXACT)
    assert found.losses.reports["rewards_chosen"] == pytest.approx(sum(implied[True]) / 4, rel=EXACT)
    assert found.losses.reports["rewards_rejected"] == pytest.approx(sum(implied[False]) / 3, rel=EXACT)
    assert (found.losses.counts["good"], found.losses.counts["bad"]) == (4, 3)
    compare(made, reference)


def pairs_in_rows(rows) -> list[tuple[int, int]]:
    """The two samples of each whole unit; an odd number's last sample is a unit by itself."""
    order = torch.tensor(Units(rows.plan.lengths[0], rows.prepared.settings, 0).order)
    return [(int(a), int(b)) for a, b in order[:len(order) // 2 * 2].view(-1, 2)]


def test_reward_against_autograd(meshes, tmp_path):
    """Bradley-Terry's loss of the scores behind the end of sentence, with margins, and scores held around 0."""
    config = replace(CONFIG, reward_head=True)
    rows = rows_of(write_rows(tmp_path / "pairs.jsonl", pairs(5)), "reward")
    made = trainer(meshes, PreferenceSettings("reward", center_rewards_coefficient=0.2), config)
    batch = PreferenceSampler(Sampler(rows, 512, ""), rows, None).batch(0, rows.rows_per_epoch, 1)
    found = made.train_step(batch, learning_rate=0.0)
    weights = weights_of(made.stages[0])
    table_2SD = rope_table(config, LENGTH, torch.device("cpu"), torch.float64)
    reference = ReferenceModel(config, weights, table_2SD, config.qk_head_dim**-0.5)
    values = []
    for number in range(10):
        ids = torch.tensor(rows.sample(0, number)[0].tolist())
        assert ids[-2] == ids[-1] == 257  # the end of sentence is read, and a label without loss stands behind it
        values.append((reference.states(ids[None, :-1])[0, -1] @ reference.weights["score.weight"][0]))
    margins = [0.5 if number % 3 == 0 else 0.0 for number in range(5)]
    losses = [-(a - b - margin).sigmoid().log() + 0.2 * (a + b)**2
              for a, b, margin in zip(values[::2], values[1::2], margins)]
    (sum(losses) / 5).backward()
    assert found.losses.reports["reward_loss"] == pytest.approx((sum(losses) / 5).item(), rel=EXACT)
    assert found.losses.reports["rewards_chosen"] == pytest.approx(sum(values[::2]).item() / 5, rel=EXACT)
    compare(made, reference)


def test_the_base_of_adapters_is_their_reference(meshes, tmp_path):
    """Sums of a model without adapters, of the same weights; then the adapters are as before."""
    settings, lora = PreferenceSettings("dpo"), LoraSettings(2, 4.0)
    rows = rows_of(write_rows(tmp_path / "pairs.jsonl", pairs(3)), "dpo")
    base, adapted = trainer(meshes, settings), trainer(meshes, settings, lora=lora)
    load(adapted.stages[0], {**weights_of(adapted.stages[0]), **weights_of(base.stages[0])})
    before = weights_of(adapted.stages[0])
    batch = PreferenceSampler(Sampler(rows, 512, ""), rows, None).batch(0, rows.rows_per_epoch, 1)
    found = Completion(False, True)(adapted, batch).per_token[REFERENCE]
    expected = weighted_scores(base, batch)
    assert (found - expected).abs().max() < EXACT < (weighted_scores(adapted, batch) - expected).abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(adapted.stages[0]).items())
