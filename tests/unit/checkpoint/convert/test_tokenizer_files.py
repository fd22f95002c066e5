"""The tokenizer beside weights: transformers reads the ids that training had, and configs name its tokens."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_checkpoints import V3_WIDE, convert, random_weights, write_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig

from megatron_deepseek.checkpoint.convert.tokenizer_files import (
    TokenIds,
    read_token_ids,
    replace_tokenizer,
    tokenizer_to_keep,
)
from megatron_deepseek.checkpoint.job.export import keep_model_file, keep_tokenizer
from megatron_deepseek.data.tokenizer import BOS, EOD, ByteTokenizer, build_tokenizer
from megatron_deepseek.settings import DataSettings

TEXT = "def f(x):\n    return 'naïve 漢字 \U0001f600'  # \x00\x7f\r\n"


def words(directory: Path, **config) -> Path:
    """A tokenizer.json whose eos has an id of its own, and a tokenizer_config.json if there is anything to say."""
    directory.mkdir(parents=True)
    backend = Tokenizer(models.WordLevel({"w0": 0, "w1": 1, "w2": 2}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([BOS, "<pad>", EOD])
    backend.save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def data(kind: str, model: Path | str | None) -> DataSettings:
    return DataSettings(("x",), 8, tokenizer_type=kind, tokenizer_model=model and str(model))


def as_model(directory: Path) -> Path:
    """As servers find it: beside the config.json of the model."""
    (directory / "config.json").write_text(json.dumps(V3_WIDE.to_hf_dict()))
    return directory


def test_bytes_are_read_alike_by_transformers(tmp_path):
    files, ids = tokenizer_to_keep("ByteTokenizer", None)
    replace_tokenizer(tmp_path, files)
    ours, theirs = ByteTokenizer(), AutoTokenizer.from_pretrained(as_model(tmp_path))
    assert theirs(TEXT).input_ids == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT
    assert (ids.bos_token_id, ids.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eod)
    assert theirs.decode([ours.eod]) == EOD and len(theirs) == ours.vocab_size
    assert read_token_ids(tmp_path) == ids


def test_a_tokenizer_json_alone_is_read_alike(tmp_path):
    """Megatron-LM asks for no tokenizer_config.json; transformers would not know the end without one."""
    files, ids = tokenizer_to_keep("HuggingFaceTokenizer", str(words(tmp_path / "own")))
    (tmp_path / "out").mkdir()
    replace_tokenizer(tmp_path / "out", files)
    theirs = AutoTokenizer.from_pretrained(as_model(tmp_path / "out"))
    ours = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "own"))
    assert theirs("w1 w2 w1").input_ids == ours.encode("w1 w2 w1") == [1, 2, 1]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (3, 5, 5)
    assert ids == TokenIds(3, 5, 5)


def test_what_is_beside_it_goes_with_it(tmp_path):
    own = words(tmp_path / "own", eos_token=EOD, pad_token="<pad>", added="x")
    (own / "chat_template.jinja").write_text("T")
    (own / "notes.json").write_text("{}")
    files, ids = tokenizer_to_keep("HuggingFaceTokenizer", str(own / "tokenizer.json"))
    assert sorted(files) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads(files["tokenizer_config.json"])["added"] == "x" and ids == TokenIds(3, 5, 4)
    assert tokenizer_to_keep("NullTokenizer", "99") == ({}, TokenIds(None, 99, 99))


def test_an_export_names_the_tokens_of_its_tokenizer(tmp_path):
    """From a checkpoint of training that was never in this form: its preset's ids are of another vocabulary."""
    config = replace(V3_WIDE, bos_token_id=100000, eos_token_id=100001)
    hf = write_hf(tmp_path / "hf", random_weights(config, torch.bfloat16), config.to_hf_dict())
    (hf / "generation_config.json").unlink()
    assert convert("hf", "native", hf, tmp_path / "run") == 0
    for path in (tmp_path / "run" / "huggingface").iterdir():
        path.unlink()
    (tmp_path / "run" / "huggingface").rmdir()
    assert convert("native", "hf", tmp_path / "run", tmp_path / "none") == 0
    none = json.loads((tmp_path / "none" / "config.json").read_text())
    assert (none["bos_token_id"], none["eos_token_id"]) == (None, None)

    keep_tokenizer(tmp_path / "run", data("HuggingFaceTokenizer", words(tmp_path / "own", pad_token="<pad>")))
    assert convert("native", "hf", tmp_path / "run", tmp_path / "some") == 0
    some = json.loads((tmp_path / "some" / "config.json").read_text())
    assert [some[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [3, 5, 4]
    generation = GenerationConfig.from_pretrained(tmp_path / "some")
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (5, 4, 3)
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.95)  # as V3 and R1
    assert AutoTokenizer.from_pretrained(tmp_path / "some")("w2").input_ids == [2]


def test_the_config_of_a_run_from_nothing_goes_out_with_what_has_no_meaning_here(tmp_path):
    """In the dialect of --model's file, with the ids of the tokenizer and what the command line changed."""
    hf = write_hf(tmp_path / "hf", random_weights(V3_WIDE, torch.bfloat16), V3_WIDE.to_hf_dict())
    assert convert("hf", "native", hf, tmp_path / "run") == 0
    for path in (tmp_path / "run" / "huggingface").iterdir():
        path.unlink()
    given = {name: value for name, value in V3_WIDE.to_hf_dict().items() if name not in ("seq_aux", "use_cache")}
    (tmp_path / "model.json").write_text(json.dumps(given | {"unsloth_version": "1", "aux_loss_alpha": 0.5}))
    for _ in range(2):
        keep_model_file(tmp_path / "run", tmp_path / "model.json", V3_WIDE)
        keep_tokenizer(tmp_path / "run", data("ByteTokenizer", None))
    keep_model_file(tmp_path / "run", None, V3_WIDE)
    assert convert("native", "hf", tmp_path / "run", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == given | {"unsloth_version": "1", "bos_token_id": 256, "eos_token_id": 257}


def test_another_tokenizer_takes_the_place_of_the_one_that_came(tmp_path):
    """The same stays as it came; another one brings its ids, also into a generation_config.json that is there."""
    weights = random_weights(V3_WIDE, torch.bfloat16)
    hf = write_hf(tmp_path / "hf", weights, V3_WIDE.to_hf_dict() | {"eos_token_id": [7, 8]})
    for file in words(tmp_path / "came", eos_token="w2").iterdir():
        (hf / file.name).write_bytes(file.read_bytes())
    (hf / "special_tokens_map.json").write_text("{}")
    assert convert("hf", "native", hf, tmp_path / "run") == 0
    keep_tokenizer(tmp_path / "run", data("HuggingFaceTokenizer", hf))
    assert convert("native", "hf", tmp_path / "run", tmp_path / "same") == 0
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((tmp_path / "same" / file).read_text()) == json.loads((hf / file).read_text())
    keep_tokenizer(tmp_path / "run", data("ByteTokenizer", None))
    assert convert("native", "hf", tmp_path / "run", tmp_path / "other") == 0
    other = json.loads((tmp_path / "other" / "config.json").read_text())
    assert (other["bos_token_id"], other["eos_token_id"]) == (256, 257)
    generation = json.loads((tmp_path / "other" / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    assert not (tmp_path / "other" / "special_tokens_map.json").exists()


def test_assets_bring_a_tokenizer_and_a_template_is_put_on_request(tmp_path, capsys):
    hf = write_hf(tmp_path / "hf", random_weights(V3_WIDE, torch.bfloat16), V3_WIDE.to_hf_dict())
    assert convert("hf", "hf", hf, tmp_path / "without") == 0
    assert "without a tokenizer" in capsys.readouterr().out
    own = words(tmp_path / "own", pad_token="<pad>")
    (own / "mine.txt").write_text("{{ messages[0]['content'] }}")
    template = str(own / "mine.txt")
    assert convert("hf", "hf", hf, tmp_path / "out", "--assets", str(own), "--chat-template", template) == 0
    assert "without a tokenizer" not in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 5
    assert convert("hf", "hf", hf, tmp_path / "refused", "--assets", str(own), "--chat-template", "deepseek-v3") == 2
    assert "writes <｜User｜>, which is no token of" in capsys.readouterr().err


@pytest.mark.parametrize("kind, model", [("ByteTokenizer", None), ("NullTokenizer", "40")])
def test_keeping_twice_changes_nothing(tmp_path, kind, model):
    template = "deepseek-v3" if kind == "ByteTokenizer" else None
    keep_tokenizer(tmp_path, data(kind, model), template)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "huggingface").iterdir()}
    assert len(before) == (4 if template else 1)
    keep_tokenizer(tmp_path, data(kind, model), template)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes())
                      for path in (tmp_path / "huggingface").iterdir()}


def test_ids_without_texts_leave_the_tokenizer_that_came_with_the_weights(tmp_path):
    """Data may be ids already, by the very tokenizer that the weights have: its files are the export's."""
    own = words(tmp_path / "huggingface", eos_token=EOD)
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    keep_tokenizer(tmp_path, data("NullTokenizer", "40"))
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
