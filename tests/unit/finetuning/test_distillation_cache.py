"""The files of a cache, which label tokens they are for, and whose tokens: without a model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_data import write_rows

from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.finetuning.distillation.cache_files import CachedDataset, Description, dataset_key
from megatron_deepseek.finetuning.distillation.inputs import CachedSampler
from megatron_deepseek.finetuning.distillation.objective import IDS, LOG_PROBABILITIES, REST
from megatron_deepseek.finetuning.distillation.same_tokens import first_difference, refuse_other_vocabulary
from megatron_deepseek.finetuning.loss_weights import LossWeights, WeightsWriter
from megatron_deepseek.finetuning.prepare import prepare
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.finetuning.settings import DataSettings as Conversations
from megatron_deepseek.settings import DataSettings

DESCRIPTION = Description("hash", "teacher", "entries", 512, 3, 1.0, "fp16")


def test_labels_are_tokens_with_a_weight_behind_the_first(tmp_path):
    """Runs of all kinds, at the beginning too, against a count of each sample's weights."""
    writer = WeightsWriter()
    for runs in ([(3, 0.0), (2, 1.0)], [(1, 0.5)], [(4, 1.0), (1, 0.0), (2, 0.25)], [(2, 0.0)]):
        writer.add(runs)
    writer.write(tmp_path / "weights")
    weights = LossWeights(tmp_path / "weights")
    assert weights.labels.tolist() == [int((weights.of(n)[1:] != 0).sum()) for n in range(4)] == [2, 0, 5, 0]


@pytest.fixture
def rows(tmp_path) -> Rows:
    chats = [{"messages": [{"role": "user", "content": "q" * (1 + n % 3)},
                           {"role": "assistant", "content": "x" * (n % 5 + 1)}]} for n in range(9)]
    settings = Conversations((str(write_rows(tmp_path / "chats.jsonl", chats)),), tokenizer_type="ByteTokenizer",
                             template="deepseek-v3", seq_length=32, num_workers=1)
    return Rows(prepare(settings, lambda line: None), epochs=2)


def filled(rows: Rows, directory: Path) -> CachedDataset:
    """Of each label token ids that are the token, its number in the sample and the sample's."""
    (prefix,) = rows.prepared.prefixes
    dataset = CachedDataset(directory, DESCRIPTION, prefix, dataset_key(prefix))
    dataset.open_to_write()
    for sample in range(dataset.num_samples):
        ids, weights = rows.sample(0, sample)
        labels = ids[1:][weights[1:] != 0]
        numbers = np.arange(len(labels))
        dataset.keep(sample, np.stack([labels, numbers, numbers * 0 + sample], 1), np.tile([-1.0, -2.0, -np.inf],
                     (len(labels), 1)), np.full(len(labels), -np.inf))
        dataset.finish([sample])
    return dataset


def test_every_label_gets_its_own_predictions(rows, tmp_path):
    """In packed rows of two epochs, shuffled; blank rows behind them have none."""
    dataset = filled(rows, tmp_path / "cache")
    assert dataset.open() and dataset.done.all()
    batch = CachedSampler(Sampler(rows, 512, "--dataset"), rows, [dataset]).batch(0, 2 * rows.rows_per_epoch + 1, 1)
    ids_BSK, is_label = batch.per_token[IDS], batch.weights_BS != 0
    assert torch.equal(ids_BSK[is_label][:, 0].long(), batch.labels_BS[is_label])
    for number, (ids_SK, weights_S) in enumerate(zip(ids_BSK, batch.weights_BS)):
        counted = [dataset.starts[sample + 1] - dataset.starts[sample] for _, sample in rows.samples_in(number)]
        numbers = [place for of_sample in counted for place in range(int(of_sample))]
        assert ids_SK[weights_S != 0][:, 1].tolist() == numbers
    assert is_label[:-1].any(1).all() and not is_label[-1].any()
    assert batch.per_token[LOG_PROBABILITIES][is_label].unique(dim=0).tolist() == [[-1.0, -2.0, -1e4]]
    assert (batch.per_token[REST][is_label] == -1e4).all() and not ids_BSK[~is_label].any()


@pytest.mark.parametrize("damage", [lambda content: content[:-2], lambda content: content + b"12"])
def test_damaged_files_are_made_anew(rows, tmp_path, damage):
    dataset = filled(rows, tmp_path / "cache")
    assert dataset.nbytes == int(dataset.starts[-1]) * (3 * 6 + 2) + 9
    file = dataset.folder / "log_probabilities.npy"
    file.write_bytes(damage(file.read_bytes()))
    again = CachedDataset(tmp_path / "cache", DESCRIPTION, rows.prepared.prefixes[0], dataset.folder.name)
    assert not again.open()
    again.open_to_write()
    assert not again.done.any()


def test_a_description_is_read_as_it_was_written(tmp_path):
    DESCRIPTION.write(tmp_path)
    assert Description.read(tmp_path) == DESCRIPTION
    DESCRIPTION.write(tmp_path)
    with pytest.raises(ValueError, match="holds another cache: kd_temperature is 1.0, not 2.0$"):
        Description("hash", "moved", "entries", 512, 3, 2.0, "fp16").write(tmp_path)
    (tmp_path / "cache.json").write_text(json.dumps({"version": 9}))
    with pytest.raises(ValueError, match="another version"):
        Description.read(tmp_path)


def tokenizer(directory: Path, words: list[str]) -> Path:
    from tokenizers import Tokenizer, models
    directory.mkdir()
    made = models.WordLevel({word: n for n, word in enumerate(words)}, words[0])
    Tokenizer(made).save(str(directory / "tokenizer.json"))
    return directory


def test_other_tokens_are_refused_with_the_first_that_differs(tmp_path):
    """The same entries pass whatever the rows of the embeddings; without a tokenizer the rows must be as many."""
    mine = tokenizer(tmp_path / "mine", ["</s>", "b", "c"])
    data = DataSettings((), 32, tokenizer_model=str(mine))
    refuse_other_vocabulary(tokenizer(tmp_path / "same", ["</s>", "b", "c"]), data, 152_064, 151_936)
    with pytest.raises(ValueError, match="another tokenizer than --tokenizer-model .*: id 1 is 'x' there and 'b' here"):
        refuse_other_vocabulary(tokenizer(tmp_path / "other", ["</s>", "x", "c"]), data, 3, 3)
    with pytest.raises(ValueError, match="a vocabulary of 4 ids, the student of 3"):
        refuse_other_vocabulary(tmp_path, data, 4, 3)
    refuse_other_vocabulary(tmp_path, data, 3, 3)
    assert first_difference({"a": 0}, {"a": 0, "b": 1}) == "id 1 is no token there and 'b' here (1 and 2 tokens)"
