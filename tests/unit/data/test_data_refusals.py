"""Data that cannot be trained on is refused in a line: damaged files, too few samples, ids outside the vocabulary."""

import numpy as np
import pytest
import torch
from small_datasets import SEQ, settings_of, tokens_of, train_set, write_dataset

from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.data.blend import parse_split
from megatron_deepseek.data.indexed import IndexedWriter
from megatron_deepseek.data.pretraining import check_data, check_token_ids


@pytest.mark.parametrize("split", ["", "a,b", "1,1,1,1", "-1,2,0", "0,0,0", "nan,1", "1;1"])
def test_bad_splits_are_refused(split):
    with pytest.raises(ValueError, match=f"--split {split}: "):
        parse_split(split)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    r"data.idx does not exist": lambda bin, idx: idx.unlink(),
    r"data.bin does not exist": lambda bin, idx: bin.unlink(),
    r"data.bin is truncated: 100 bytes, where .*data.idx points at \d+": lambda bin, idx: cut(bin, 100),
    r"data.idx is truncated: 200 bytes, 842 for its 40 sequences": lambda bin, idx: cut(idx, 200),
    r"data.idx is truncated: 20 bytes, its header alone has 34": lambda bin, idx: cut(idx, 20),
    r"data.idx is no index of this format: it begins with b''": lambda bin, idx: cut(idx, 0),
    r"data.idx is no index of this format: it begins with b'\{": lambda bin, idx: idx.write_bytes(b'{"text": 1}'),
    r"data.idx has version 2": lambda bin, idx: idx.write_bytes(idx.read_bytes().replace(b"\1", b"\2", 1)),
    r"data.idx has dtype code 7": lambda bin, idx: idx.write_bytes(idx.read_bytes().replace(b"\x08", b"\x07", 1)),
    r"data.idx is damaged: 852 bytes, 842": lambda bin, idx: idx.write_bytes(idx.read_bytes() + bytes(10)),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_files_are_refused(tmp_path, message):
    write_dataset(tmp_path / "data")
    DAMAGE[message](tmp_path / "data.bin", tmp_path / "data.idx")
    with pytest.raises(ValueError, match=rf"--data-path {tmp_path}/data: .*{message}") as caught:
        check_data(settings_of(tmp_path / "data"), 1000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, vocab_size, num_samples, message", [
    ({"tokenizer_model": "1000"}, 1000, (1, 0, 0),
     "--tokenizer-model 1000: its vocabulary of 1001 is larger than the model's vocab_size 1000"),
    ({"tokenizer_model": "10"}, 999, (1, 0, 0), "token ids from 0 to 999 in .*outside the model's vocab_size 999"),
    ({"seq_length": 0}, 1000, (1, 0, 0), "--seq-length 0: it must be at least 1"),
    ({"seq_length": 10_000}, 1000, (1, 0, 0), "its train split .* too small for one sample of --seq-length 10000"),
    ({"split": "1,0,0"}, 1000, (1, 1, 0), r"its valid split \(--split 1,0,0: 0 of 40 sequences, 0 tokens\) is too sm"),
    ({"split": "99,1,0"}, 1000, (1, 1, 0), r"its valid split \(--split 99,1,0: 0 of 40 sequences, 0 tokens\) is too"),
    ({"data_cache_path": "/dev/null"}, 1000, (1, 0, 0), "--data-cache-path /dev/null: cannot write indices"),
])
def test_data_that_does_not_fit_is_refused(tmp_path, changes, vocab_size, num_samples, message):
    write_dataset(tmp_path / "data")
    check_data(settings_of(tmp_path / "data"), 1000)
    with pytest.raises(ValueError, match=message):
        check_data(settings_of(tmp_path / "data", **changes), vocab_size, num_samples)


def test_the_smallest_dataset_is_one_sample_and_one_token(tmp_path):
    for tokens, fits in ((0, False), (SEQ, False), (SEQ + 1, True)):
        writer = IndexedWriter(str(tmp_path / "data"), "<u2")
        writer.add(np.arange(tokens, dtype="<u2"), [[tokens]] if tokens else [[]])
        writer.finish()
        writer.publish()
        if fits:
            check_data(settings_of(tmp_path / "data"), 1000)
            assert tokens_of(train_set(settings_of(tmp_path / "data"), 2)) == [list(range(SEQ))] * 2
        else:
            with pytest.raises(ValueError, match="too small for one sample" if tokens else "holds no sequences"):
                check_data(settings_of(tmp_path / "data"), 1000)


def test_negative_ids_are_refused_and_batches_are_checked(tmp_path):
    write_dataset(tmp_path / "data", base=-1, dtype="<i4")
    with pytest.raises(ValueError, match="token ids from -1 to 999 in"):
        check_data(settings_of(tmp_path / "data"), 1000)
    with pytest.raises(ValueError, match="--data-path x: token ids from 0 to 5 in a batch, outside .*vocab_size 5"):
        check_token_ids(torch.tensor([0, 5]), 5, "x")


@pytest.mark.parametrize("name", ["tokens", "labels"])
@pytest.mark.parametrize("wrong", [-1, 10])
def test_every_id_of_a_batch_is_looked_at(name, wrong):
    sample = {"tokens": torch.arange(2, 10), "labels": torch.arange(8), "loss_mask": torch.ones(8), "source": 0}
    assert Sampler([sample], 10, "x").batch(0, 1, 1).tokens_BS.max() == 9
    sample[name][-1] = wrong
    with pytest.raises(ValueError, match=f"--data-path x: token ids from .*{wrong}.* in a batch"):
        Sampler([sample], 10, "x").batch(0, 1, 1)
