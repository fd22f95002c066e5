"""A step on conversations: packed as unpacked, means over tokens and samples, noise by sample and position."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import V3_SMALL, enliven, gradients_of, relative_error, whole_stage

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.finetuning.held_out import together
from megatron_deepseek.finetuning.noise import NoisySampler
from megatron_deepseek.finetuning.objectives import HeldOut, objective_of
from megatron_deepseek.finetuning.prepare import prepare
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.finetuning.settings import DataSettings
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.noise import BOUNDS, KEYS, EmbeddingNoise
from megatron_deepseek.model.step import Rows as ModelRows
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.sequence_sums import SequenceSums
from megatron_deepseek.settings import LossSettings, OptimizerSettings
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

LENGTH, DEPTHS, ALPHA = 64, 2, 5.0
CONFIG = replace(V3_SMALL, vocab_size=512, num_nextn_predict_layers=DEPTHS)
EXACT = 1e-9  # the promise; float64 sums in another order differ by 1e-15 to 1e-13


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Of very different lengths, one with two turns of which the first has no loss."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [[("user", "a" * (1 + number % 3)), ("assistant", "b" * (1 + 5 * (number % 4)))] for number in range(9)]
    rows += [[("user", "c"), ("assistant", "no loss"), ("user", "d"), ("assistant", "e")]]
    messages = [[{"role": role, "content": content} for role, content in row] for row in rows]
    messages[-1][1]["loss"] = False
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    return path


def rows_of(chats: Path, packing: bool) -> Rows:
    settings = DataSettings((str(chats),), tokenizer_type="ByteTokenizer", template="deepseek-v3", seq_length=LENGTH,
                            packing=packing, num_workers=1)
    return Rows(prepare(settings, lambda line: None), epochs=1)


def epoch(rows: Rows, alpha: float = ALPHA, more_rows: int = 0) -> Batch:
    """All rows of an epoch as one batch, with so many blank ones behind them."""
    sampler = Sampler(rows, CONFIG.vocab_size, "--dataset")
    size = rows.rows_per_epoch + more_rows
    return NoisySampler(sampler, rows, alpha, CONFIG.hidden_size, 1).batch(0, size, 1)


def trainer(meshes, average: str, micro_batch_size: int = 1) -> Trainer:
    build = BuildOptions(precision=Precision(torch.float64), loss=LossSettings(balance_type="none"))
    made = Trainer(TrainingSpec(CONFIG, (whole_stage(CONFIG),), "1F1B", LENGTH, micro_batch_size, build,
                                OptimizerSettings(clip_grad=0.0)), meshes, objective_of(average, DEPTHS, 0.3))
    enliven(made.stages[0])
    return made


def assert_same_step(one: Trainer, one_batch: Batch, other: Trainer, other_batch: Batch) -> None:
    found, expected = (made.train_step(batch, learning_rate=0.0)
                       for made, batch in ((one, one_batch), (other, other_batch)))
    assert found.losses.reports == pytest.approx(expected.losses.reports, rel=EXACT)
    assert found.losses.num_labels == expected.losses.num_labels
    theirs = gradients_of(other.stages[0])
    for name, gradient in gradients_of(one.stages[0]).items():
        assert relative_error(gradient, theirs[name]) < EXACT, name


@pytest.mark.parametrize("average", ["token", "sample"])
def test_packed_rows_train_as_rows_with_one_conversation_each(meshes, chats, average):
    """Losses and gradients of both means, of the main prediction and two MTP depths, with noise and a blank row."""
    packed, apart = rows_of(chats, True), rows_of(chats, False)
    assert packed.rows_per_epoch < apart.rows_per_epoch == 10
    assert_same_step(trainer(meshes, average, 2), epoch(packed, more_rows=packed.rows_per_epoch % 2),
                     trainer(meshes, average), epoch(apart))


def test_noise_is_of_the_step_and_the_seed_alone(chats):
    """The same again when asked again; another in another epoch; none on padding."""
    rows = Rows(rows_of(chats, True).prepared)
    sampler = NoisySampler(Sampler(rows, 512, ""), rows, ALPHA, 16, 1)
    size = rows.rows_per_epoch
    first, again, second = (sampler.batch(start, size, 1) for start in (0, 0, size))
    assert torch.equal(first.per_token[KEYS], again.per_token[KEYS])
    assert not set(first.per_token[KEYS][first.real_BS].tolist()) & set(second.per_token[KEYS][second.real_BS].tolist())
    assert not first.per_token[BOUNDS][~first.real_BS].any() and first.per_token[BOUNDS][first.real_BS].all()
    half = sampler.batch(0, size, 1, 1, size)  # the second of as many data ranks
    assert torch.equal(half.per_token[KEYS], first.per_token[KEYS][1:2])


def test_noise_is_uniform_within_the_bound_of_the_paper():
    """alpha / sqrt(L d): 0.0018455 for alpha 5, a sample of 1,024 tokens and V3's hidden size."""
    bound = ALPHA / (1024 * 7168) ** 0.5
    assert bound == pytest.approx(0.0018455, abs=5e-8)
    keys_BS = torch.arange(128).view(2, 64) * 7919
    noise = EmbeddingNoise(keys_BS, torch.full((2, 64), bound)).add_to(torch.zeros(2, 64, 7168, dtype=torch.float64))
    assert noise.abs().max() <= bound and noise.abs().max() > 0.999 * bound
    assert noise.mean().abs() < bound / 300 and noise.var() == pytest.approx(bound**2 / 3, rel=0.01)
    part = EmbeddingNoise(keys_BS, torch.full((2, 64), bound)).add_to(torch.zeros(2, 16, 7168, dtype=torch.float64), 32)
    assert torch.equal(part, noise[:, 32:48])


class Given:
    """Predictions of the given token losses."""

    def __init__(self, losses_BS: torch.Tensor):
        self.losses_BS, self.num_depths = losses_BS, 0

    def log_probabilities(self, depth: int = 0) -> torch.Tensor:
        return -self.losses_BS


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("average, expected", [("token", 3.5), ("sample", 5.0)])
def test_means_of_two_samples(average, expected, packed):
    """Losses [1, 2, 3] and [8]: in two micro-batches, or packed in one row."""
    objective = objective_of(average, 0, 0.0)
    if packed:
        losses = [torch.tensor([[1.0, 2.0, 3.0, 8.0]])]
        weights, sums = [torch.ones(1, 1, 4)], SequenceSums(Documents.find(torch.tensor([[0, 0, 0, 1]])))
    else:
        losses, sums = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[8.0, 9.0, 9.0]])], SequenceSums()
        weights = [torch.ones(1, 1, 3), torch.tensor([[[1.0, 0.0, 0.0]]])]
    micro_batches = [ModelRows(torch.zeros_like(each, dtype=torch.int64), each, sums) for each in weights]
    counts: dict[str, float] = {}
    for rows in micro_batches:
        for name, number in objective.counts(rows).items():
            counts[name] = counts.get(name, 0.0) + float(number)
    total = sum(objective.contribution(Given(loss), rows, counts).loss for loss, rows in zip(losses, micro_batches))
    assert float(total) == expected


def test_held_out_means_do_not_depend_on_batches(meshes, chats):
    rows = rows_of(chats, False)
    batch = epoch(rows, alpha=0.0)
    batch = replace(batch, per_token={})
    made = trainer(meshes, "token")
    whole = together([made.evaluate(batch, HeldOut(DEPTHS))])
    parts = together([made.evaluate(batch.rows(slice(start, start + 2)), HeldOut(DEPTHS)) for start in range(0, 10, 2)])
    assert (parts.loss, parts.token_accuracy, *parts.mtp_loss) == pytest.approx(
        (whole.loss, whole.token_accuracy, *whole.mtp_loss), rel=EXACT)
    assert parts.tokens == whole.tokens == int((batch.weights_BS > 0).sum())
