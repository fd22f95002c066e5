"""Training of a grouped-query model that begins with a Hugging Face directory and ends with one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import write_hf
from small_models import lively
from transformers import AutoModelForCausalLM

from megatron_deepseek.checkpoint.convert.names import hf_shapes
from megatron_deepseek.model.architecture.config import ModelConfig

QWEN2 = ModelConfig(
    vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=1, head_dim=8, qkv_bias=True, tie_word_embeddings=True, max_position_embeddings=64)


@pytest.mark.slow
def test_weights_go_in_and_out(workshop):
    """A step of size zero changes no weight, with the only head of keys on both ranks; transformers reads what comes
    out.
    """
    generator = torch.Generator().manual_seed(3)
    weights = {name: lively(name, torch.Size(shape), generator).bfloat16() for name, shape in hf_shapes(QWEN2).items()}
    released = write_hf(workshop.directory / "qwen2", weights, QWEN2.to_hf_dict() | {"auto_map": {"a": "of theirs"}})
    out = workshop.directory / "qwen2_out"
    workshop.train(2, "qwen2_still", "--model", str(released), "--load", str(released), "--train-iters", "1", "--lr",
                   "1e-30", "--weight-decay", "0", "--bf16", "--tensor-model-parallel-size", "2",
                   "--sequence-parallel", "--save-hf", str(out))
    ours = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert ours.keys() == weights.keys()
    assert not [name for name, tensor in weights.items() if not torch.equal(ours[name].float(), tensor.float())]
    given, written = (json.loads((path / "config.json").read_text()) for path in (released, out))
    assert written == given | {"bos_token_id": 256, "eos_token_id": 257}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.get_output_embeddings().weight is (
        model.get_input_embeddings().weight)
