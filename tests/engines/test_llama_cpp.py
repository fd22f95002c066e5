"""Exports in llama.cpp: GGUF files equal its own converter's, and it serves the texts that transformers says.

float32 sums in another order: 1e-4 of log-probabilities. Of FP8 the reference is our own conversion to float32, beside
which llama.cpp may round keys and values to float16: 3e-3.
"""

import json
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

from megatron_deepseek.data.tokenizer import ByteTokenizer, build_tokenizer

MODELS = {"v3": V3_LIKE, "lite": V2_LITE_LIKE, **DENSE}
ALL = LENGTH * len(PROMPTS)
TEXTS = ["Hello world, it's 12345 o'clock.\n\n\t  x = [1, 2]  # no", "北京 天气 naïve café — “q” \U0001f600\U0001f468‍\U0001f469",
         "<｜User｜>What is 7 times 6?<｜Assistant｜>", "    def f(x):\r\n        return x+1;;  \n"]
# Ours says more or less than the converter's: a name, a version read out of it, the size of a vocabulary that can be
# counted, a size of heads, and groups of which all are reached.
OTHERWISE = {"general.name", "general.version", "qwen2.vocab_size", "qwen3.vocab_size", "qwen2.rope.dimension_count",
             "qwen3.rope.dimension_count", "deepseek2.expert_group_count", "deepseek2.expert_group_used_count"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_engine_model(root / name, config) for name, config in MODELS.items()}


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


@pytest.mark.parametrize("name, outtype, dtype", [
    ("v3", "bf16", "bf16"), ("lite", "q8_0", "q8_0"), ("llama", "f32", "fp32"), ("qwen2", "f16", "fp16"),
    ("qwen3", "f32", "fp32")])
def test_a_file_is_that_of_llama_cpps_converter(models, tmp_path, name, outtype, dtype):
    """To the bit, but the stretched frequencies of Llama 3, which it computes in float32."""
    theirs = GGUFReader(convert_by_llama_cpp(models[name], tmp_path / "theirs.gguf", outtype))
    ours = GGUFReader(to_gguf(models[name], tmp_path / "out", "--dtype", dtype))
    differing = {key for key in keys(ours).keys() | keys(theirs).keys() if keys(ours).get(key) != keys(theirs).get(key)}
    assert not differing - OTHERWISE
    found, wanted = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
    assert found.keys() == wanted.keys() and len(found) > 30
    for tensor in ours.tensors:
        other = wanted[tensor.name]
        assert (tensor.tensor_type, tensor.shape.tolist()) == (other.tensor_type, other.shape.tolist()), tensor.name
        if tensor.name == "rope_freqs.weight":
            np.testing.assert_allclose(tensor.data, other.data, rtol=1e-5)
        else:
            np.testing.assert_array_equal(tensor.data, other.data, err_msg=tensor.name)


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_transformers(models, tmp_path, name):
    expected = by_transformers(models[name])
    with llama_serving(to_gguf(models[name], tmp_path / "out")) as server:
        found = server.answers()
    assert equal_tokens(found, expected) == ALL and furthest_off(found, expected) < 1e-4


def test_a_model_trained_over_ranks(models, workshop, tmp_path):
    """Its last checkpoint, and what --save-hf made of it: one file, in which training changed every text."""
    trained = train_from(workshop, models["v3"], "tp2 ep2")
    native = to_gguf(trained.native, tmp_path / "native", origin="native")
    exported = to_gguf(trained.exported, tmp_path / "native2")
    for tensor, other in zip(GGUFReader(native).tensors, GGUFReader(exported).tensors, strict=True):
        np.testing.assert_array_equal(tensor.data, other.data, err_msg=tensor.name)
    expected = by_transformers(trained.exported)
    with llama_serving(native) as server:
        found = server.answers()
    assert equal_tokens(found, expected) == ALL and furthest_off(found, expected) < 1e-4
    assert equal_tokens(found, by_transformers(models["v3"])) < ALL


def test_fp8_is_read_as_here(models, tmp_path):
    """llama.cpp's converter and ours read the FP8 export alike; the text is that of our conversion back to float32."""
    assert convert("hf", "hf", models["v3"], tmp_path / "fp8", "--dtype", "fp8") == 0
    assert convert("hf", "hf", tmp_path / "fp8", tmp_path / "fp32", "--dtype", "fp32") == 0
    file = to_gguf(tmp_path / "fp8", tmp_path / "out", "--dtype", "fp32")
    theirs = convert_by_llama_cpp(tmp_path / "fp8", tmp_path / "theirs.gguf", "f32")
    for tensor, other in zip(sorted(GGUFReader(file).tensors), sorted(GGUFReader(theirs).tensors), strict=True):
        assert tensor.name == other.name
        np.testing.assert_array_equal(tensor.data, other.data, err_msg=tensor.name)
    expected = by_transformers(tmp_path / "fp32")
    with llama_serving(file, "f16") as server:
        found = server.answers()
    assert equal_tokens(found, expected) == ALL and furthest_off(found, expected) < 3e-3


def test_it_cuts_texts_as_in_training_and_asks_by_the_template(models, tmp_path):
    """Of V3's kind of tokenizer, and of bytes: a text's ids, a chat's, and where a text ends."""
    template = "--chat-template", "deepseek-v3"
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(models["v3"]))
    with llama_serving(to_gguf(models["v3"], tmp_path / "bpe", *template)) as server:
        assert [server.tokenize(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        asked = server.ask("/apply-template", messages=[{"role": "user", "content": "hi"}])["prompt"]
        assert asked.endswith("<｜User｜>hi<｜Assistant｜>")
        said = server.ask("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
        assert said["usage"] == said["usage"] | {"prompt_tokens": 4, "completion_tokens": 4}
        properties = server.get("/props")
        assert (properties["bos_token"], properties["eos_token"]) == ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    bytes_only = ByteTokenizer()
    write_byte_tokenizer(tmp_path / "bytes")
    file = to_gguf(models["lite"], tmp_path / "out", "--assets", str(tmp_path / "bytes"))
    with llama_serving(file) as server:
        assert [server.tokenize(text) for text in TEXTS if "｜" not in text] == [
            bytes_only.encode(text) for text in TEXTS if "｜" not in text]


def write_byte_tokenizer(folder: Path) -> None:
    from megatron_deepseek.checkpoint.convert.tokenizer_files import replace_tokenizer, tokenizer_to_keep
    folder.mkdir()
    replace_tokenizer(folder, tokenizer_to_keep("ByteTokenizer", None)[0])


def test_several_files_are_one_model(models, tmp_path):
    assert convert("hf", "gguf", models["v3"], tmp_path / "out", "--max-shard-size", "15MB") == 0
    first, *others = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(others) > 1 and first.name == f"model-F32-00001-of-{len(others) + 1:05d}.gguf"
    with llama_serving(first) as server, llama_serving(to_gguf(models["v3"], tmp_path / "one")) as one:
        assert server.answer(PROMPTS[0]) == one.answer(PROMPTS[0])
