"""Released models beside DeepSeek's V2 and V3, as their config.json has them: the distilled ones, DeepSeek's first
models, and other publishers' of V3's form.

tests/helpers/released_configs.py has the files; a test reads each and compares it with what stands here.
"""

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.rope_scaling import RopeScaling

# DeepSeek-LLM (arXiv 2401.02954), of Llama's form
_DEEPSEEK_LLM = {"vocab_size": 102400, "max_position_embeddings": 4096, "bos_token_id": 100000, "eos_token_id": 100001}
DEEPSEEK_LLM_7B = ModelConfig(
    **_DEEPSEEK_LLM, hidden_size=4096, intermediate_size=11008, num_hidden_layers=30, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128)
DEEPSEEK_LLM_67B = ModelConfig(
    **_DEEPSEEK_LLM, hidden_size=8192, intermediate_size=22016, num_hidden_layers=95, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128)

# DeepSeekMoE (arXiv 2401.06066)
DEEPSEEK_MOE_16B = ModelConfig(
    **_DEEPSEEK_LLM, hidden_size=2048, intermediate_size=10944, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=16, head_dim=128, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
    num_experts_per_tok=6, first_k_dense_replace=1, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False,
    aux_loss_alpha=0.001)

# R1's students (arXiv 2501.12948, section 2.4): Qwen2.5-Math 1.5B and 7B, Qwen2.5 14B and 32B, Llama 3.1 8B, 3.3 70B
_R1_QWEN = {"max_position_embeddings": 131072, "head_dim": 128, "qkv_bias": True, "bos_token_id": 151643,
            "eos_token_id": 151643}
_R1_QWEN_MATH = _R1_QWEN | {"num_hidden_layers": 28, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}
_R1_QWEN_LARGE = _R1_QWEN | {"vocab_size": 152064, "hidden_size": 5120, "num_attention_heads": 40,
                             "num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
R1_DISTILL_QWEN_1_5B = ModelConfig(
    **_R1_QWEN_MATH, vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
    num_key_value_heads=2)
R1_DISTILL_QWEN_7B = ModelConfig(
    **_R1_QWEN_MATH, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
    num_key_value_heads=4)
R1_DISTILL_QWEN_14B = ModelConfig(**_R1_QWEN_LARGE, intermediate_size=13824, num_hidden_layers=48)
R1_DISTILL_QWEN_32B = ModelConfig(**_R1_QWEN_LARGE, intermediate_size=27648, num_hidden_layers=64)
_R1_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
             "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "bos_token_id": 128000, "eos_token_id": 128001,
             "rope_scaling": RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)}
R1_DISTILL_LLAMA_8B = ModelConfig(
    **_R1_LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
R1_DISTILL_LLAMA_70B = ModelConfig(
    **_R1_LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)

# Other publishers' models of V3's form, all with one dense layer and no groups of experts
_V3_FORM = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "first_k_dense_replace": 1,
            "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "aux_loss_alpha": 0.001}
KIMI_K2 = ModelConfig(  # arXiv 2507.20534
    **_V3_FORM, vocab_size=163840, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
    num_attention_heads=64, q_lora_rank=1536, v_head_dim=128, moe_intermediate_size=2048, n_routed_experts=384,
    n_shared_experts=1, num_experts_per_tok=8, routed_scaling_factor=2.827, max_position_embeddings=131072,
    rope_theta=50000.0, rope_scaling=RopeScaling("yarn", 32.0, 4096, 1.0, 1.0, 1.0, 1.0), bos_token_id=163584,
    eos_token_id=163585, released_as="kimi_k2")
MOONLIGHT_16B_A3B = ModelConfig(  # arXiv 2502.16982
    **_V3_FORM, vocab_size=163840, hidden_size=2048, intermediate_size=11264, num_hidden_layers=27,
    num_attention_heads=16, v_head_dim=128, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
    num_experts_per_tok=6, routed_scaling_factor=2.446, max_position_embeddings=8192, rope_theta=50000.0,
    rms_norm_eps=1e-5, bos_token_id=163584, eos_token_id=163585)
GIGACHAT3_10B_A1_8B = ModelConfig(
    **_V3_FORM, vocab_size=128256, hidden_size=1536, intermediate_size=8960, num_hidden_layers=26,
    num_attention_heads=32, v_head_dim=192, moe_intermediate_size=1280, n_routed_experts=64, n_shared_experts=1,
    num_experts_per_tok=4, num_nextn_predict_layers=1, max_position_embeddings=262144, rope_theta=100000.0,
    bos_token_id=1, eos_token_id=2)
