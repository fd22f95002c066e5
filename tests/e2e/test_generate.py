"""tools/generate.py as a user runs it: the same words as transformers, from released weights and from checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, PreTrainedTokenizerFast

from megatron_deepseek.cli.convert_checkpoint import main as convert
from megatron_deepseek.cli.generate import main
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.inference.generate import continuation

REPOSITORY = Path(__file__).parents[2]
CONFIG = DeepseekV3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    first_k_dense_replace=1, n_group=4, topk_group=2, initializer_range=0.3, max_position_embeddings=64,
    bos_token_id=0, eos_token_id=1)


def generate(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, REPOSITORY / "tools" / "generate.py", *map(str, arguments)], text=True,
                          capture_output=True, timeout=240,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A model that transformers saved, which announces an MTP module and holds none, with a tokenizer of words."""
    directory = tmp_path_factory.mktemp("generate") / "hf"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(directory)
    words = {"<s>": 0, "</s>": 1, **{f"w{index}": index for index in range(2, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


def theirs(directory: Path, prompt: str) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def test_words_are_those_of_transformers(released, tmp_path, capsys):
    """From released weights, and from the checkpoint that they are converted to; the tokenizer is theirs."""
    assert convert(["--from", "hf", "--to", "native", "--load", str(released), "--save", str(tmp_path / "native")]) == 0
    prompt = "w5 w9 w20"
    expected = theirs(released, prompt)
    assert len(expected.split()) >= 11
    asked = ["--prompt", prompt, "--max-new-tokens", "12", "--temperature", "0"]
    done = generate("--load", released, *asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected
    capsys.readouterr()
    assert main(["--load", str(tmp_path / "native"), *asked]) == 0
    assert capsys.readouterr().out.strip() == expected


def test_the_blank_before_the_first_new_word_stays():
    """Tokenizers in the manner of SentencePiece drop it at the beginning of a text, which the new tokens are not."""
    pieces = Tokenizer(models.WordLevel({"</s>": 0, "\u2581Hello": 1, "\u2581world": 2, "s": 3}, unk_token="</s>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = build_tokenizer("NullTokenizer", "9")
    assert continuation(tokenizer, [7, 8], [1, 2]) == " 1 2"
    tokenizer.decode = lambda ids: pieces.decode(ids, skip_special_tokens=False)
    assert continuation(tokenizer, [1], [2, 3]) == " worlds"
    assert continuation(tokenizer, [], [2, 3]) == "worlds"


def test_refused_early_and_in_a_line(released, tmp_path, capsys):
    """Before torch builds anything: each in one line that says what to do."""
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        (bare / file).symlink_to(released / file)
    for arguments, named in (
            (("--load", tmp_path / "none"), "there is no such directory"),
            (("--load", tmp_path / "empty"), "it holds no finished checkpoint"),
            (("--load", bare), "has no tokenizer.json with it: --tokenizer-model must name one"),
            (("--load", bare, "--tokenizer-type", "NullTokenizer", "--tokenizer-model", 200, "--prompt", "150"),
             "the prompt has id 150"),
            (("--load", released, "--seq-length", 100), "--seq-length 100 is longer than the model's max_position_emb"),
            (("--load", released, "--prompt", "w5 \udcff"), r"--prompt 'w5 \udcff' is not UTF-8: character 3 is no"),
            (("--load", released, "--temperature", -1), "--temperature: -1 is not a number from 0 up")):
        assert main(["--prompt", "w5", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("generate.py: error: ") and named in said and said.count("\n") == 1, said


def test_an_empty_prompt_begins_a_document(released, capsys):
    assert main(["--load", str(released), "--prompt", "", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out.split()) == 5
