"""Datasets in which no token id is twice, and training sets of them, for the tests of pre-training data."""

import numpy as np

from megatron_deepseek.data.indexed import IndexedWriter
from megatron_deepseek.data.pretraining import build_datasets
from megatron_deepseek.settings import DataSettings

SEQ = 8
EOD = 999


def write_dataset(prefix, num_documents=40, base=0, dtype="<u2", seed=0):
    """Documents of 3 to 30 ids that count up through the dataset from `base`, each with its EOD: no id is twice."""
    lengths = np.random.default_rng(seed).integers(3, 30, num_documents)
    ids = np.split(base + np.arange(lengths.sum()), np.cumsum(lengths)[:-1])
    documents = [np.append(part, EOD).astype(dtype) for part in ids]
    writer = IndexedWriter(str(prefix), dtype)
    writer.add(np.concatenate(documents), [[len(document)] for document in documents])
    writer.finish()
    writer.publish()
    return documents


def settings_of(*data_path, **changes):
    values = {"seq_length": SEQ, "split": "1,0,0", "tokenizer_type": "NullTokenizer", "tokenizer_model": str(EOD)}
    return DataSettings(tuple(map(str, data_path)), **(values | changes))


def train_set(settings, num_samples):
    return build_datasets(settings, (num_samples, 0, 0))[0]


def tokens_of(dataset, count=None):
    return [dataset[index]["tokens"].tolist() for index in range(count or len(dataset))]
