"""Exports in llama.cpp: GGUF files equal its own converter's, and it serves the texts that transformers says.

float32 sums in another order: 1e-4 of log-probabilities. Of FP8 the reference is our own conversion to float32.
"""

from pathlib import Path

import numpy as np
import pytest
from engine_answers import LENGTH, PROMPTS, by_transformers, equal_tokens, furthest_off
from engine_models import DENSE, V2_LITE_LIKE, V3_LIKE, write_engine_model
from engine_training import train_from
from llama_cpp import convert_by_llama_cpp, llama_serving, need_llama_cpp
from small_checkpoints import convert
from workshop import make_workshop

need_llama_cpp()
pytestmark = pytest.mark.slow

from gguf import GGUFReader

from megatron_deepseek.checkpoint.convert.tokenizer_files import replace_tokenizer, tokenizer_to_keep
from megatron_deepseek.data.tokenizer import BOS, EOD, ByteTokenizer, build_tokenizer

MODELS = {"v3": V3_LIKE, "lite": V2_LITE_LIKE, **DENSE}
ALL = LENGTH * len(PROMPTS)
TEXTS = ["Hello world, it's 12345 o'clock.\n\n\t  x = [1, 2]  # no",
         "北京 天气 naïve café — “q” \U0001f600\U0001f468‍\U0001f469",
         "<｜User｜>What is 7 times 6?<｜Assistant｜>", "    def f(x):\r\n        return x+1;;  \n"]
# The converter reads a name and a version out of the directory's name, writes groups of which all are reached, and
# leaves out for some families what llama.cpp can count: the vocabulary, and the size of heads.
OTHERWISE = ("general.name", "general.version", ".expert_group_count", ".expert_group_used_count", "qwen2.vocab_size",
             "qwen3.vocab_size", ".key_length", ".value_length", ".rope.dimension_count")
CONVERTED = {"v3": ("bf16", "bf16"), "lite": ("q8_0", "q8_0"), "llama": ("f32", "fp32"), "qwen2": ("f16", "fp16"),
             "qwen3": ("f32", "fp32"), "fp8": ("f32", "fp32")}  # llama.cpp's name of the type, and ours


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {name: write_engine_model(root / name, config) for name, config in MODELS.items()}
    assert convert("hf", "hf", found["v3"], root / "fp8", "--dtype", "fp8") == 0
    return found | {"fp8": root / "fp8"}


@pytest.fixture(scope="module")
def theirs(models, tmp_path_factory) -> dict[str, Path]:
    """The files of llama.cpp's converter, all written by one process: it takes seconds to start."""
    root = tmp_path_factory.mktemp("theirs")
    convert_by_llama_cpp((outtype, root / f"{name}.gguf", models[name]) for name, (outtype, _) in CONVERTED.items())
    return {name: root / f"{name}.gguf" for name in CONVERTED}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def to_gguf(load: Path, save: Path, *more: str, origin: str = "hf") -> Path:
    assert convert(origin, "gguf", load, save, *more) == 0
    (file,) = save.glob("*.gguf")
    return file


def keys(reader: GGUFReader) -> dict[str, tuple]:
    return {name: (tuple(field.types), field.contents()) for name, field in reader.fields.items()
            if not name.startswith("GGUF.")}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_file_is_that_of_llama_cpps_converter(models, theirs, tmp_path, name):
    """To the bit, FP8 too; but the stretched frequencies of Llama 3, which it computes in float32."""
    ours, other = GGUFReader(to_gguf(models[name], tmp_path / "out", "--dtype", CONVERTED[name][1])), GGUFReader(
        theirs[name])
    said, wanted = keys(ours), keys(other)
    differing = {key for key in said.keys() | wanted.keys() if said.get(key) != wanted.get(key)}
    assert not [key for key in differing if not key.endswith(OTHERWISE)]
    assert [tensor.name for tensor in by_name(ours)] == [tensor.name for tensor in by_name(other)]
    assert len(ours.tensors) > 30
    for tensor, other in zip(by_name(ours), by_name(other), strict=True):
        assert (tensor.tensor_type, tensor.shape.tolist()) == (other.tensor_type, other.shape.tolist()), tensor.name
        if tensor.name == "rope_freqs.weight":
            np.testing.assert_allclose(tensor.data, other.data, rtol=1e-5)
        else:
            np.testing.assert_array_equal(tensor.data, other.data, err_msg=tensor.name)


def by_name(reader: GGUFReader) -> list:
    return sorted(reader.tensors, key=lambda tensor: tensor.name)


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_transformers(models, tmp_path, name):
    expected = by_transformers(models[name])
    with llama_serving(to_gguf(models[name], tmp_path / "out")) as server:
        found = server.answers()
    assert equal_tokens(found, expected) == ALL and furthest_off(found, expected) < 1e-4


def test_a_model_trained_over_ranks(models, workshop, tmp_path):
    """Its last checkpoint makes the file that --save-hf's directory makes; training has changed the texts."""
    exported = tmp_path / "exported"
    native = train_from(workshop, models["v3"], "tp2-ep2", "--save-hf", str(exported))
    file, other = to_gguf(native, tmp_path / "native", origin="native"), to_gguf(exported, tmp_path / "hf")
    for tensor, same in zip(by_name(GGUFReader(file)), by_name(GGUFReader(other)), strict=True):
        np.testing.assert_array_equal(tensor.data, same.data, err_msg=tensor.name)
    expected = by_transformers(exported)
    with llama_serving(file) as server:
        found = server.answers()
    assert equal_tokens(found, expected) == ALL and furthest_off(found, expected) < 1e-4
    assert equal_tokens(found, by_transformers(models["v3"])) < ALL


def test_fp8_is_read_as_here(models, theirs, tmp_path):
    """The text of llama.cpp's own conversion of the FP8 export is that of ours back to float32."""
    assert convert("hf", "hf", models["fp8"], tmp_path / "fp32", "--dtype", "fp32") == 0
    expected = by_transformers(tmp_path / "fp32")
    with llama_serving(theirs["fp8"]) as server:
        found = server.answers()
    assert equal_tokens(found, expected) == ALL and furthest_off(found, expected) < 1e-4


def test_it_cuts_texts_as_in_training_and_asks_by_the_template(models, tmp_path):
    """Of V3's kind of tokenizer, and of bytes: a text's ids, a chat's, and where a text ends."""
    template = "--chat-template", "deepseek-v3"
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(models["v3"]))
    with llama_serving(to_gguf(models["v3"], tmp_path / "bpe", *template)) as server:
        assert [server.tokenize(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        asked = server.ask("/apply-template", messages=[{"role": "user", "content": "hi"}])["prompt"]
        assert asked.endswith("<｜User｜>hi<｜Assistant｜>")
        usage = server.ask("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=4)["usage"]
        assert usage["prompt_tokens"] == 1 + len(tokenizer.encode("<｜User｜>hi<｜Assistant｜>"))  # begin once
        properties = server.get("/props")
        assert (properties["bos_token"], properties["eos_token"]) == (BOS, EOD)
    bytes_only = ByteTokenizer()
    (tmp_path / "bytes").mkdir()
    replace_tokenizer(tmp_path / "bytes", tokenizer_to_keep("ByteTokenizer", None)[0])
    file = to_gguf(models["lite"], tmp_path / "out", "--assets", str(tmp_path / "bytes"))
    with llama_serving(file) as server:
        assert [server.tokenize(text) for text in TEXTS if "｜" not in text] == [
            bytes_only.encode(text) for text in TEXTS if "｜" not in text]


def test_several_files_are_one_model(models, tmp_path):
    assert convert("hf", "gguf", models["v3"], tmp_path / "out", "--max-shard-size", "15MB") == 0
    first, *others = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(others) > 1 and first.name == f"model-F32-00001-of-{len(others) + 1:05d}.gguf"
    with llama_serving(first) as server, llama_serving(to_gguf(models["v3"], tmp_path / "one")) as one:
        assert server.answer(PROMPTS[0]) == one.answer(PROMPTS[0])
