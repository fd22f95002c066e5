"""Validation of all data and of several sets, by a trainer whose loss of a label is its id: means are then known."""

import pytest
import torch
from small_datasets import EOD, SEQ, write_dataset

from megatron_deepseek.arguments import Settings, parse
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.pretraining import build_datasets, make_plan
from megatron_deepseek.pretraining.loop import Pretraining
from megatron_deepseek.runtime.resume import num_samples
from megatron_deepseek.training.acceptance import ValidationLosses
from megatron_deepseek.training.next_token import NextToken

IDS = "--tokenizer-type NullTokenizer --tokenizer-model"


class Meshes:
    device = torch.device("cpu")

    def __init__(self, rank: int):
        self.data_rank = rank

    def rank(self, axis: str) -> int:
        return self.data_rank


class LabelTrainer:
    """A stand-in for a Trainer whose loss is the mean id of the labels, and at depth 1 twice that."""

    def __init__(self, rank: int = 0):
        self.objective, self.meshes, self.batches = NextToken(1), Meshes(rank), []

    def evaluate(self, batch: Batch, objective) -> ValidationLosses:
        self.batches.append(batch)
        labels = float(batch.weights_BS.sum())
        loss = float((batch.labels_BS * batch.weights_BS).sum()) / (labels or 1.0)
        reports = {"lm_loss": loss, "mtp_loss_1": 2 * loss, "mtp_acceptance_1": 0.5}
        counts = {"labels": labels, "labels_1": labels}
        for source in range(0 if batch.sources_BK is None else batch.sources_BK.shape[1]):
            weights_BS = batch.weights_BS * batch.sources_BK[:, source, None]
            reports[f"source_loss_{source}"] = float((batch.labels_BS * weights_BS).sum())
            counts |= dict.fromkeys((f"source_weight_{source}", f"source_labels_{source}"), float(weights_BS.sum()))
        return ValidationLosses(reports, 0.0, counts)


class Heard:
    """A report that remembers."""

    def __init__(self):
        self.validations, self.held, self.drawn = [], [], []

    def validation(self, *what):
        self.validations.append(what)

    def held_out(self, iteration, name, results):
        self.held.append((iteration, name, results))

    def curves(self, iteration, curves):
        self.drawn.append(curves)


@pytest.fixture
def corpora(tmp_path):
    for number in range(3):
        write_dataset(tmp_path / f"set{number}", num_documents=20 + 9 * number, base=1000 * number, seed=number)
    return [tmp_path / f"set{number}" for number in range(3)]


def settings_of(corpora, more: str, ranks: int = 1) -> Settings:
    return parse(f"--model tiny --vocab-size 8192 --train-data-path {corpora[0]} {IDS} {EOD} --seq-length {SEQ} "
                 f"--train-iters 1 --global-batch-size 4 {more}".split(), ranks)


def validated(settings: Settings, rank: int = 0) -> tuple[LabelTrainer, Heard]:
    data = Pretraining().prepare(settings).open_data(settings, TrainState(), lambda line: None)
    trainer, heard = LabelTrainer(rank), Heard()
    data.validate(trainer, heard, 7)
    return trainer, heard


def every_label(settings: Settings, corpus) -> torch.Tensor:
    """Of one epoch of a dataset, read as training would read it."""
    alone = parse(f"--model tiny --vocab-size 8192 --train-data-path {corpus} {IDS} {EOD} --seq-length {SEQ} "
                  "--train-iters 1 --global-batch-size 1".split(), 1).data
    dataset, *_ = build_datasets(alone, (1, 0, 0))
    return torch.stack([dataset[number]["labels"] for number in range(dataset.samples_per_epoch)])


def test_every_sample_counts_once(meshes, corpora):
    """Also in the last batch, which is filled up with rows that are no text."""
    settings = settings_of(corpora, f"--valid-data-path {corpora[1]} --full-validation --micro-batch-size 2")
    assert num_samples(settings)[1] > 0 and settings.run.eval_interval == 1000
    trainer, heard = validated(settings)
    labels = every_label(settings, corpora[1])
    assert len(labels) % 4, "else no row is filled in"
    (iteration, loss, mtp, sources, acceptance), = heard.validations
    assert (iteration, loss) == (7, pytest.approx(labels.double().mean().item(), rel=1e-12))
    assert mtp == pytest.approx((2 * loss,)) and acceptance == (0.5,) and sources is None
    real = torch.cat([batch.labels_BS[batch.weights_BS[:, 0] > 0] for batch in trainer.batches])
    assert torch.equal(real, labels)
    assert all(batch.real_BS is None for batch in trainer.batches[:-1])
    last = trainer.batches[-1]
    assert last.real_BS.all(1).tolist() == (last.weights_BS > 0).all(1).tolist()
    assert last.real_BS.all(1).tolist() == [row < len(labels) % 4 for row in range(4)]


def test_data_ranks_share_the_rows(meshes, corpora):
    """Each has the same number of batches, and both know of the same ones whether rows of them are no text."""
    settings = settings_of(corpora, f"--valid-data-path {corpora[1]} --full-validation", 2)
    (one, _), (other, _) = (validated(settings, rank) for rank in range(2))
    assert [batch.real_BS is None for batch in one.batches] == [batch.real_BS is None for batch in other.batches]
    seen = torch.cat([torch.stack([mine.labels_BS, its.labels_BS], 1).flatten(0, 1)
                      for mine, its in zip(one.batches, other.batches, strict=True)])
    labels = every_label(settings, corpora[1])
    assert torch.equal(seen[:len(labels)], labels)


def test_all_datasets_of_a_blend_are_read_whole(meshes, corpora):
    """Whatever their weights; losses are also told of each."""
    settings = settings_of(corpora, f"--valid-data-path 0.9 {corpora[1]} 0.1 {corpora[2]} --full-validation")
    _, heard = validated(settings)
    labels = [every_label(settings, corpus) for corpus in corpora[1:]]
    (_, loss, _, sources, _), = heard.validations
    assert loss == pytest.approx(torch.cat(labels).double().mean().item(), rel=1e-12)
    assert sources == {name: pytest.approx(each.double().mean().item(), rel=1e-12)
                       for name, each in zip(("set1", "set2"), labels)}
    plan = make_plan(settings.data, num_samples(settings)).splits[1]
    assert [weight * plan.num_samples for weight in plan.weights] == pytest.approx(list(map(len, labels)))


@pytest.mark.parametrize("names, suffixes", [
    ("", ("-0", "-1")), ("--validation-set-names wiki code", ("-wiki", "-code"))])
def test_each_set_is_evaluated_by_itself(meshes, corpora, names, suffixes):
    """All of it, or the same first batches; curves have Megatron-LM's names, everything else those of the files."""
    base = f"--valid-data-path {corpora[1]} {corpora[2]} --multiple-validation-sets {names} " \
        "--log-validation-ppl-to-tensorboard"
    for how, count in (("--full-validation", None), ("--eval-iters 2", 8)):
        settings = settings_of(corpora, f"{base} {how}")
        _, heard = validated(settings)
        assert not heard.validations
        for (iteration, name, results), curves, corpus, file, suffix in zip(
                heard.held, heard.drawn, corpora[1:], ("set1", "set2"), suffixes, strict=True):
            loss = every_label(settings, corpus)[:count].double().mean().item()
            assert (iteration, name) == (7, suffix[1:] if names else file)
            assert results["loss"] == pytest.approx(loss, rel=1e-12)
            assert results["perplexity"] == pytest.approx(2.718281828459045**20), "of a loss of at most 20"
            assert curves.by_samples == {
                f"lm loss validation{suffix}": results["loss"],
                f"mtp_1 loss validation{suffix}": results["mtp_loss"][0],
                **dict.fromkeys((f"lm loss validation{suffix} ppl", f"mtp_1 loss validation{suffix} ppl"),
                                results["perplexity"])}


def test_what_cannot_be_evaluated_is_refused(meshes, corpora, tmp_path):
    """A set without a sample is left out of a blend, but has no mean of its own."""
    write_dataset(tmp_path / "small", num_documents=1, seed=11)
    valid = f"--valid-data-path {corpora[1]} {tmp_path / 'small'} --full-validation"
    _, heard = validated(settings_of(corpora, valid))
    assert heard.validations[0][1] == pytest.approx(every_label(settings_of(corpora, ""), corpora[1]).double().mean())
    with pytest.raises(ValueError, match="--valid-data-path .*small: its valid split .* too small for one"):
        Pretraining().check(settings_of(corpora, f"{valid} --multiple-validation-sets"))
    with pytest.raises(ValueError, match="--validation-set-names a has 1 names, but the validation data has 2 sets"):
        Pretraining().check(settings_of(corpora, f"--valid-data-path {corpora[1]} {corpora[2]} --full-validation "
                                        "--multiple-validation-sets --validation-set-names a"))
