"""tools/generate.py as a user runs it: the same words as transformers, from released weights and from checkpoints."""

import json
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
from megatron_deepseek.inference.text import AnswerText

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

    def continuation(prompt: list[int], tokens: list[int]) -> str:
        text = AnswerText(tokenizer, tuple(prompt))
        for token in tokens:
            text.add(token)
        text.end()
        return text.settled

    assert continuation([7, 8], [1, 2]) == " 1 2"
    tokenizer.decode = lambda ids: pieces.decode(ids, skip_special_tokens=False)
    assert continuation([1], [2, 3]) == " worlds"
    assert continuation([], [2, 3]) == "worlds"


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


LINES = [{"prompt": "w5 w9 w20"}, {"prompt": [5, 9, 20], "max_tokens": 3, "id": "three"},
         {"prompt": "w7", "temperature": 1.5, "n": 2, "logprobs": 1}, {"prompt": "w8 w8", "temperature": 1.5},
         {"prompt": "w8 w8", "temperature": 1.5}]


def write_prompts(path: Path, lines=LINES) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments_of(released: Path, tmp_path: Path, *more) -> list[str]:
    return ["--load", str(released), "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "12",
            "--temperature", "0", "--output", str(tmp_path / "answers.jsonl"), *map(str, more)]


def answers_in(path: Path) -> dict[int, dict]:
    """By line; each stands there once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({each["line"] for each in found}) == len(found)
    return {each["line"]: each for each in found}


def test_a_file_of_prompts(released, tmp_path, capsys):
    """Each with its own sampling. An answer does not depend on what else is asked, nor on where the run was killed."""
    write_prompts(tmp_path / "prompts.jsonl")
    arguments, output = arguments_of(released, tmp_path), tmp_path / "answers.jsonl"
    assert main(arguments) == 0
    whole = answers_in(output)
    assert sorted(whole) == [1, 2, 3, 4, 5]
    assert whole[4]["outputs"] != whole[5]["outputs"]  # the same prompt twice: each line draws for itself
    first = whole[1]["outputs"][0]
    assert f"w5 w9 w20{first['text']}" == theirs(released, "w5 w9 w20") and first["finish_reason"] in ("length", "stop")
    assert whole[2]["outputs"][0]["tokens"] == first["tokens"][:3] and whole[2]["id"] == "three"
    assert len(whole[3]["outputs"]) == 2 and whole[3]["outputs"][0]["tokens"] != whole[3]["outputs"][1]["tokens"]
    assert len(whole[3]["outputs"][0]["log_probabilities"]) == len(whole[3]["outputs"][0]["tokens"])

    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[1] + lines[2][:20])  # as a kill leaves it
    assert main([*arguments, "--max-running", "1", "--token-budget", "2", "--block-size", "2"]) == 0
    assert output.read_bytes().startswith(lines[0] + lines[1])
    again = answers_in(output)
    assert {line: [each["tokens"] for each in answer["outputs"]] for line, answer in again.items()} == {
        line: [each["tokens"] for each in answer["outputs"]] for line, answer in whole.items()}
    assert again[3]["outputs"][1]["log_probabilities"] == pytest.approx(  # float32, added up in another order
        whole[3]["outputs"][1]["log_probabilities"], abs=1e-4)
    capsys.readouterr()
    before = output.read_bytes()
    assert main([*arguments, "--seed", "5"]) == 2
    assert "is no answer to these prompts, with these options" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_prompts_that_cannot_be_asked(released, tmp_path, capsys):
    """Before a model is loaded; the line is named, and nothing is written."""
    for lines, named in (
            ([{"prompt": "w5"}, {"text": "w5"}], "line 2: it must have either \"prompt\" or \"messages\""),
            ([{"prompt": "w5", "top_p": 7}], "line 1: top_p is 7; it must be at most 1"),
            ([{"prompt": "w5", "topp": 7}], "line 1: 'topp' is neither one of prompt, messages"),
            ([{"prompt": [5, 64]}], "line 1: the prompt has id 64, but"),
            ([{"prompt": []}], "line 1: the prompt is empty"),
            ([{"prompt": [5] * 64}], "line 1: the prompt has 64 tokens, and --seq-length 64 must leave room"),
            ([{"messages": [{"role": "user", "content": "w5"}]}], "--template auto: the tokenizer"),
            (["w5"], "line 1 is no JSON object")):
        write_prompts(tmp_path / "prompts.jsonl", lines)
        assert main(arguments_of(released, tmp_path)) == 2
        said = capsys.readouterr().err
        assert said.startswith("generate.py: error: ") and named in said and said.count("\n") == 1, said
        assert not (tmp_path / "answers.jsonl").exists()
    (tmp_path / "prompts.jsonl").write_bytes(b"\n\n")
    assert main(arguments_of(released, tmp_path)) == 2
    assert "has no line with a prompt" in capsys.readouterr().err
    assert main(["--load", str(released), "--prompt", "w5", "--output", str(tmp_path / "x")]) == 2
    assert "--output needs --prompts" in capsys.readouterr().err
    assert main(["--load", str(released), "--prompt", "w5", "--draft-tokens", "1"]) == 2
    assert "holds no Multi-Token Prediction module" in capsys.readouterr().err
    assert main(["--load", str(released), "--prompt", "w5", "--tensor-model-parallel-size", "2"]) == 2
    assert "--tensor-model-parallel-size 2 does not divide the 1 rank of this job" in capsys.readouterr().err
