"""An embedding that was padded for its ranks: exports are without the padding."""

import json
from dataclasses import replace

import pytest
import torch
from native_checkpoints import MODEL, random_state, write_native
from small_checkpoints import all_tensors
from tokenizers import Tokenizer, models

from megatron_deepseek.arguments import parse
from megatron_deepseek.checkpoint.convert.assets import DIRECTORY, read_assets
from megatron_deepseek.checkpoint.job.export import export_hf, keep_tokenizer, keep_vocab_size
from megatron_deepseek.settings import DataSettings, RunSettings

PADDED = replace(MODEL, vocab_size=384)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def saved(request, tmp_path_factory):
    """A checkpoint whose embedding has 384 rows, of which 260 are the vocabulary's."""
    config = replace(PADDED, tie_word_embeddings=request.param)
    root, state = tmp_path_factory.mktemp("run"), random_state(config)
    keep_tokenizer(write_native(root, state, config), DataSettings((), 64, tokenizer_type="ByteTokenizer"))
    keep_vocab_size(root, 260)
    return root, state, config


def test_an_export_has_the_rows_of_the_vocabulary(saved, tmp_path):
    root, state, config = saved
    export_hf(RunSettings(1, save=root, save_hf=tmp_path / "hf"), 0, 1)
    tensors = all_tensors(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 260
    assert torch.equal(tensors["model.embed_tokens.weight"], state["model.model.embed_tokens.weight"][:260])
    if not config.tie_word_embeddings:
        assert torch.equal(tensors["lm_head.weight"], state["model.lm_head.weight"][:260])
    assert torch.equal(tensors["model.norm.weight"], state["model.model.norm.weight"])


def test_the_note_outlives_another_tokenizer(tmp_path):
    words = {"word": 0, "<eos>": 9}
    Tokenizer(models.WordLevel(words, unk_token="word")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "run").mkdir()
    keep_vocab_size(tmp_path / "run", 260)
    keep_vocab_size(tmp_path / "run", None)
    keep_tokenizer(tmp_path / "run", DataSettings((), 64, tokenizer_model=str(tmp_path)))
    kept = read_assets(tmp_path / "run" / DIRECTORY)
    assert (kept.vocab_size, kept.tokens.eos_token_id) == (260, 9)


def test_which_vocabulary_a_run_has():
    base = "--data-path a --train-iters 1 --seq-length 64 --tokenizer-type ByteTokenizer"
    padded = parse(f"--model tiny {base} --vocab-size 260 --make-vocab-size-divisible-by 64".split(), 1)
    assert (padded.model.vocab_size, padded.run.unpadded_vocab_size) == (320, 260)
    exact = parse(f"--model tiny {base} --make-vocab-size-divisible-by 64".split(), 1)
    assert (exact.model.vocab_size, exact.run.unpadded_vocab_size) == (8192, None)
    said = parse(f"--model tiny {base} --vocab-size 260 --padded-vocab-size 300".split(), 1)
    assert (said.model.vocab_size, said.run.unpadded_vocab_size) == (300, 260)
    for words, message in (("--padded-vocab-size 100", "--padded-vocab-size 100 is less than the vocabulary of 8192"),
                           ("--extra-vocab-size 3", "--extra-vocab-size 3 conflicts with --model")):
        with pytest.raises(ValueError, match=message):
            parse(f"--model tiny {base} {words}".split(), 1)
