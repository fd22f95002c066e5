"""--mock-data: the documents are Megatron-LM's, the same on every machine, and a run reads them as any others."""

import shlex

import numpy as np
import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.data.mock import DOCUMENTS, document, with_mock_data
from megatron_deepseek.data.pretraining import build_datasets, check_data
from megatron_deepseek.data.indexed import open_indexed

RUN = "--model tiny --train-iters 2 --seq-length 64 --tokenizer-type NullTokenizer"


def data_of(arguments: str):
    return parse(shlex.split(f"{RUN} {arguments}"), 1).data


def test_documents_are_megatrons():
    """MockGPTLowLevelDataset: np.concatenate([np.arange(length - 1) + 1, [eod]])."""
    for length in (1, 2, 100):
        assert np.array_equal(document(length, 8192, 8191), np.concatenate([np.arange(length - 1) + 1, [8191]]))


def test_ids_stay_in_a_small_vocabulary_and_end_nowhere_else():
    for eod in (0, 1, 9):
        ids = document(50, 10, eod)
        assert 0 <= ids.min() <= ids.max() < 10 and ids[-1] == eod and eod not in ids[:-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mock")
    return folder, with_mock_data(data_of(f"--mock-data --data-cache-path {folder} --vocab-size 5000"))


def test_a_run_reads_them(made):
    _, data = made
    assert data.tokenizer_model == "4999", "the last of 5000 rows ends a document"
    check_data(data, 5000, (4, 2, 0))
    train, valid, _ = build_datasets(data, (4, 2, 0))
    tokens = train[0]["tokens"].numpy()
    follows = np.diff(tokens)[(tokens[:-1] != 4999) & (tokens[1:] != 4999)]
    assert len(tokens) == 64 and (follows == 1).all() and valid[1]["tokens"].max() < 5000


def test_files_are_made_once_and_are_the_same_everywhere(made, tmp_path):
    folder, data = made
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("mock-*")}
    assert with_mock_data(data_of(f"--mock-data --data-cache-path {folder} --vocab-size 5000")) == data
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("mock-*")} == before and len(before) == 2
    with_mock_data(data_of(f"--mock-data --data-cache-path {tmp_path} --vocab-size 5000"))
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in before)
    file = open_indexed(data.data_path[0], "--mock-data")
    assert len(file.lengths) == DOCUMENTS and len(file.ids) == file.lengths.sum() > 8_000_000


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--mock-data: .*/file/x cannot be written: .*--data-cache-path"):
        with_mock_data(data_of(f"--mock-data --data-cache-path {tmp_path}/file/x"))


def test_data_is_given_once():
    with pytest.raises(ValueError, match="--mock-data and --data-path a conflict: the data is given once"):
        data_of("--mock-data --data-path a")


def test_the_null_tokenizer_has_the_whole_vocabulary():
    assert data_of("--data-path a").tokenizer_model == "8191"
    assert data_of("--data-path a --vocab-size 100").tokenizer_model == "99"
    assert data_of("--data-path a --tokenizer-model 50").tokenizer_model == "50"
    alone = ("--num-layers 2 --hidden-size 128 --num-attention-heads 4 --max-position-embeddings 64 --vocab-size 1000 "
             "--make-vocab-size-divisible-by 128 --multi-latent-attention --mock-data --train-iters 2 --seq-length 64 "
             "--tokenizer-type NullTokenizer")
    settings = parse(alone.split(), 1)
    assert (settings.data.tokenizer_model, settings.model.vocab_size) == ("999", 1024)
