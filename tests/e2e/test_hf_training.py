"""Training that begins with a Hugging Face directory and ends with one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from megatron_deepseek.checkpoint.convert.names import hf_shapes, mtp_copies
from megatron_deepseek.data.tokenizer import ByteTokenizer
from megatron_deepseek.model.architecture.config import ModelConfig


@pytest.fixture(scope="module")
def released(workshop) -> Path:
    """The workshop's architecture with lively weights, in released form: bfloat16, MTP copies, two files."""
    config = ModelConfig.from_file(workshop.config)
    generator = torch.Generator().manual_seed(3)
    weights = {name: (torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1)).bfloat16()
               for name, shape in hf_shapes(config).items()}
    weights |= {name: weights[original].clone() for name, original in mtp_copies(config).items()}
    directory = workshop.directory / "released"
    directory.mkdir()
    for part in (0, 1):
        save_file(dict(sorted(weights.items())[part::2]), directory / f"part-{part}.safetensors")
    fields = json.loads(workshop.config.read_text()) | {"dtype": "bfloat16", "a_field": "of theirs"}
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


EXPERTS = "--expert-model-parallel-size 2".split()
SLICES = ("--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2 --pipeline-model-parallel-size 2 "
          "--pipeline-schedule Interleaved1F1B --sequence-parallel").split()


@pytest.mark.slow
def test_weights_go_in_and_out(workshop, released):
    """A step of size zero changes no weight: in any layout, out comes what went in, to the last bit."""
    still = ["--train-iters", "1", "--lr", "1e-30", "--weight-decay", "0", "--moe-router-bias-update-rate", "0",
             "--load", str(released), "--bf16"]
    records = {}
    for ranks, layout in ((2, EXPERTS), (4, SLICES)):
        out = workshop.directory / f"out{ranks}"
        metrics = workshop.train(ranks, f"still{ranks}", *still, *layout, "--save-hf", str(out))
        records[ranks] = [record["lm_loss"] for record in metrics if "lm_loss" in record]
        ours, theirs = tensors(out), tensors(released)
        assert ours.keys() == theirs.keys()
        wrong = [name for name in theirs if not torch.equal(ours[name].float(), theirs[name].float())]
        assert not wrong
        more = {"bos_token_id": 256, "eos_token_id": 257,  # of --tokenizer-type ByteTokenizer; the source had none
                "architectures": ["DeepseekV3ForCausalLM"]}
        given = json.loads((released / "config.json").read_text())
        assert json.loads((out / "config.json").read_text()) == given | more
        assert (out / "tokenizer.json").exists()
    assert records[2] == pytest.approx(records[4], rel=1e-2)


class EndsAfter(LogitsProcessor):
    """The model says `token` once there are `length` tokens."""

    def __init__(self, token: int, length: int):
        self.token, self.length = token, length

    def __call__(self, ids, scores):
        if ids.shape[1] >= self.length:
            scores[:, self.token] = 1e9
        return scores


def test_an_export_from_scratch_is_complete(workshop):
    """transformers needs nothing else: it has the tokenizer, and stops where training ended documents."""
    out = workshop.directory / "scratch_hf"
    workshop.train(1, "scratch", "--train-iters", "1", "--eval-iters", "0", "--save-hf", str(out),
                   "--chat-template", "deepseek-v3")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ours = ByteTokenizer()
    prompt = tokenizer("def f():", return_tensors="pt")
    assert prompt.input_ids[0].tolist() == ours.encode("def f():")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert chat["input_ids"] == [ours.bos, 258, *b"hi", 259]
    said = model.generate(**prompt, max_new_tokens=9, logits_processor=[EndsAfter(ours.eod, 12)])
    assert said.shape[1] == 13 and said[0, -1] == ours.eod
    assert (model.config.bos_token_id, model.config.eos_token_id) == (ours.bos, ours.eod)


def test_refusals(workshop, released):
    for more, named in ((["--load", str(released), "--hidden-size", "64"], "hidden_size 32 there, 64 here"),
                        (["--save-hf", str(released)], "exists already")):
        job = workshop.run(1, workshop.arguments("refused", *more))
        assert job.status == 2 and named in job.output, job.output
