"""An adapter that PEFT wrote, beside a model that transformers wrote: the same logits (make test-engines)."""

import pytest
import torch

peft = pytest.importorskip("peft")

from small_checkpoints import V3_WIDE
from small_models import enliven
from transformers import AutoModelForCausalLM, DeepseekV3Config

from megatron_deepseek.inference.loading import LoadSettings, join_ranks, load_model
from megatron_deepseek.inference.model_files import open_model
from megatron_deepseek.model.step import MicroBatch, Rows, StepContext


TARGETS = ["q_b_proj", "o_proj", "kv_b_proj", "kv_a_proj_with_mqa"]
PATTERNS = {"use_rslora": True, "alpha_pattern": {"o_proj": 5}, "rank_pattern": {"q_b_proj": 6}}


@pytest.mark.parametrize("more", [{}, PATTERNS], ids=["plain", "patterns"])
def test_logits_are_those_of_peft(tmp_path, more):
    """float32 sums in another order: 1e-4 of logits of about 10."""
    fields = V3_WIDE.to_hf_dict() | {"num_nextn_predict_layers": 0}
    config = DeepseekV3Config(**{key: value for key, value in fields.items() if key != "model_type"})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", dtype=torch.float32)
    enliven(model)
    model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, lora_alpha=9, target_modules=TARGETS, **more)
    adapted = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, 14, 15, 92, 65, 35]])
    with torch.no_grad():
        expected = adapted(ids).logits[0]
    loaded = load_model(open_model(tmp_path / "base", tokenizer=None), join_ranks(),
                        LoadSettings(max_length=6, adapter=tmp_path / "adapter"))
    labels = ids.unsqueeze(1)
    with torch.no_grad():
        state, *_ = loaded.stage.states(ids, MicroBatch(Rows(labels, torch.zeros_like(labels))), StepContext(1))
        torch.testing.assert_close(loaded.stage.logits(state)[0], expected, rtol=1e-4, atol=1e-3)
