"""megatron-core's own GPTModel of a DeepSeek or a Qwen2, on one CPU process: it reads a checkpoint, writes another, and
says its logits.

    python megatron_model.py CONFIG.json TOKENS.pt READ WRITE OUTPUT.pt

READ and WRITE are torch_dist directories, through megatron.core.dist_checkpointing. The weights of WRITE are random.
OUTPUT.pt: logits of the tokens [B, S, V] with the weights of either, by "read" and "written"; with MTP also the
modules' logits. Three things of megatron-core 0.16.1 need CUDA or Transformer Engine, and are replaced here: where
tensors are made, a test of an absent class, and the local attention, which has no weights and takes V as wide as QK.
"""

import json
import multiprocessing.dummy
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

torch.cuda.current_device, torch.cuda.synchronize = lambda: "cpu", lambda: None

import megatron.core.transformer.multi_latent_attention as latent_attention  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402

latent_attention.HAVE_TE, moe_utils.te_general_gemm = False, None
filesystem_async.mp = SimpleNamespace(get_context=lambda _: multiprocessing.dummy)  # threads instead of processes
filesystem_async._process_memory = lambda: 0  # noqa: SLF001 (Megatron's own, which asks for psutil)
tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=nullcontext)


class NarrowValues(DotProductAttention):
    """V may be narrower than QK."""

    def __init__(self, config, k_channels=None, v_channels=None, **options):
        super().__init__(config, **options)
        self.hidden_size_per_partition = config.v_head_dim * config.num_attention_heads


COMMON = dict(normalization="RMSNorm", gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
              hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, apply_rope_fusion=False,
              bias_dropout_fusion=False, bias_activation_fusion=False, masked_softmax_fusion=False)


SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
         "expert_model_parallel_size", "expert_tensor_parallel_size")


def grouped_query_config(fields: dict, **sizes: int) -> TransformerConfig:
    """Of a config.json of Qwen2's, whose position embedding is not scaled."""
    head_dim = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    return TransformerConfig(
        num_layers=fields["num_hidden_layers"], hidden_size=fields["hidden_size"],
        ffn_hidden_size=fields["intermediate_size"], num_attention_heads=fields["num_attention_heads"],
        num_query_groups=fields["num_key_value_heads"], kv_channels=head_dim, add_qkv_bias=True,
        layernorm_epsilon=fields["rms_norm_eps"], **COMMON, **sizes)


def transformer_config(fields: dict, **sizes: int) -> MLATransformerConfig:
    """Of a config.json with the router of V3."""
    rope = fields.get("rope_scaling") or {"type": "rope", "factor": 1.0}
    yarn = {name: rope[name] for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim",
                                          "original_max_position_embeddings") if name in rope}
    dense = fields["first_k_dense_replace"]
    return MLATransformerConfig(
        num_layers=fields["num_hidden_layers"], mtp_num_layers=fields["num_nextn_predict_layers"] or None,
        hidden_size=fields["hidden_size"], ffn_hidden_size=fields["intermediate_size"],
        num_attention_heads=fields["num_attention_heads"], q_lora_rank=fields["q_lora_rank"],
        kv_lora_rank=fields["kv_lora_rank"], qk_head_dim=fields["qk_nope_head_dim"],
        qk_pos_emb_head_dim=fields["qk_rope_head_dim"], v_head_dim=fields["v_head_dim"],
        rope_type=rope["type"], rotary_base=fields["rope_theta"], rotary_scaling_factor=rope["factor"], **yarn,
        moe_layer_freq=[0] * dense + [1] * (fields["num_hidden_layers"] - dense),
        num_moe_experts=fields["n_routed_experts"], moe_ffn_hidden_size=fields["moe_intermediate_size"],
        moe_shared_expert_intermediate_size=fields["moe_intermediate_size"] * fields["n_shared_experts"],
        moe_router_topk=fields["num_experts_per_tok"], moe_router_num_groups=fields["n_group"],
        moe_router_group_topk=fields["topk_group"], moe_router_topk_scaling_factor=fields["routed_scaling_factor"],
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_dtype="fp32",
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="allgather",
        layernorm_epsilon=fields["rms_norm_eps"], qk_layernorm=True, multi_latent_attention=True, **COMMON, **sizes)


def build(fields: dict, sizes: dict[str, int] | None = None, chunk: int = 0) -> GPTModel:
    """The model, or with `sizes` of a job (SIZES) the virtual stage `chunk` of a rank's part of it."""
    latent, given = "kv_lora_rank" in fields, {name: size for name, size in (sizes or {}).items() if size > 1}
    virtual = chunk if "virtual_pipeline_model_parallel_size" in given else None
    if given.get("pipeline_model_parallel_size"):
        given["pipeline_dtype"] = torch.float32
    config = (transformer_config if latent else grouped_query_config)(fields, **given)
    layers = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=virtual)
    for layer in layers.layer_specs if latent else ():
        layer.submodules.self_attention.submodules.core_attention = NarrowValues
    mtp = get_gpt_mtp_block_spec(config, layers, use_transformer_engine=False, vp_stage=virtual) \
        if config.mtp_num_layers else None
    first, last = (parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual),
                   parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual))
    return GPTModel(config, layers, fields["vocab_size"], fields["max_position_embeddings"], mtp_block_spec=mtp,
                    position_embedding_type="rope", rotary_base=fields["rope_theta"], pre_process=first,
                    post_process=last, vp_stage=virtual,
                    share_embeddings_and_output_weights=fields["tie_word_embeddings"]).eval()


def with_fused_norms(state: dict) -> dict:
    """The same tensors, norms under the names that they have as a part of Transformer Engine's linear layers."""
    for name, tensor in state.items():
        dense = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.weight") in state
        tensor.key = tensor.key.replace("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_")
        tensor.key = tensor.key.replace("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_")
        if name.replace("input_layernorm.weight", "self_attention.linear_qkv.weight") in state.keys() - {name}:
            tensor.key = tensor.key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        if dense:
            tensor.key = tensor.key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return state


@torch.no_grad()
def randomize(model: GPTModel) -> None:
    """Lively weights: norms around one, biases that decide which experts are chosen."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("weight", "bias")):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.2 * noise)


@torch.no_grad()
def logits(model: GPTModel, tokens_BS: torch.Tensor) -> list[torch.Tensor]:
    """[B, S, V] of the model; then, of each MTP module, as it makes them from its own input."""
    found = []
    hook = model.output_layer.register_forward_hook(
        lambda _, __, output: found.append(output[0].transpose(0, 1).clone()))
    length = tokens_BS.shape[1]
    positions = torch.arange(length).expand_as(tokens_BS)
    model(tokens_BS, positions, torch.ones(length, length, dtype=torch.bool).triu(1)[None, None], labels=tokens_BS)
    hook.remove()
    return [found[-1], *found[:-1]]


def main() -> None:
    config, tokens, read, write, output = sys.argv[1:]
    fields = json.loads(Path(config).read_text())
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    parallel_state.initialize_model_parallel()
    model, tokens_BS, said = build(fields), torch.load(tokens), {}
    state = dist_checkpointing.load(with_fused_norms(model.sharded_state_dict()), read, strict="log_all")
    lost = model.load_state_dict(state, strict=False)
    assert set(lost.unexpected_keys) == {"iteration", "checkpoint_version"}, lost
    assert all(name.endswith("_extra_state") for name in lost.missing_keys), lost
    said["read"] = logits(model, tokens_BS)
    randomize(model)
    os.makedirs(write)
    dist_checkpointing.save(model.sharded_state_dict(), write)
    said["written"] = logits(model, tokens_BS)
    torch.save(said, output)


if __name__ == "__main__":
    main()
