"""The config.json of released models, key by key as their publishers have them, by preset and name on Hugging Face.

Where several sizes share most keys they are written as changes of one another. Written from memory and from public
copies of the files: the counts of parameters that the publishers state are what they are checked against.
"""

_V3_CODE = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
_V3_FORM = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": _V3_CODE, "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "initializer_range": 0.02, "kv_lora_rank": 512, "moe_layer_freq": 1, "n_group": 1, "norm_topk_prob": True,
    "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "use_cache": True, "v_head_dim": 128}
_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

KIMI_K2 = _V3_FORM | {
    "bos_token_id": 163584, "eos_token_id": 163585, "hidden_size": 7168, "intermediate_size": 18432,
    "max_position_embeddings": 131072, "model_type": "kimi_k2", "moe_intermediate_size": 2048,
    "n_routed_experts": 384, "n_shared_experts": 1, "num_attention_heads": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "q_lora_rank": 1536,
    "quantization_config": _FP8, "rms_norm_eps": 1e-06, "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "transformers_version": "4.48.3", "vocab_size": 163840}

MOONLIGHT = _V3_FORM | {
    "bos_token_id": 163584, "eos_token_id": 163585, "hidden_size": 2048, "intermediate_size": 11264,
    "max_position_embeddings": 8192, "model_type": "deepseek_v3", "moe_intermediate_size": 1408,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
    "transformers_version": "4.46.3", "vocab_size": 163840}

GIGACHAT3 = {key: value for key, value in _V3_FORM.items() if key != "auto_map"} | {
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": 64, "hidden_size": 1536, "intermediate_size": 8960,
    "max_position_embeddings": 262144, "model_type": "deepseek_v3", "moe_intermediate_size": 1280,
    "n_routed_experts": 64, "n_shared_experts": 1, "num_attention_heads": 32, "num_experts_per_tok": 4,
    "num_hidden_layers": 26, "num_key_value_heads": 32, "num_nextn_predict_layers": 1, "q_lora_rank": None,
    "qk_head_dim": 192, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 100000.0,
    "routed_scaling_factor": 1.0, "transformers_version": "4.53.2", "v_head_dim": 192, "vocab_size": 128256}

V3_1 = _V3_FORM | {
    "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "quantization_config": _FP8 | {"scale_fmt": "ue8m0"}, "rms_norm_eps": 1e-06, "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "topk_group": 4, "transformers_version": "4.44.2",
    "vocab_size": 129280}

_QWEN_DISTILLED = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072, "model_type": "qwen2",
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 152064}
QWEN_1_5B = _QWEN_DISTILLED | {
    "hidden_size": 1536, "intermediate_size": 8960, "max_window_layers": 21, "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "sliding_window": 4096, "transformers_version": "4.44.0", "use_mrope": False, "vocab_size": 151936}
QWEN_7B = _QWEN_DISTILLED | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "sliding_window": 4096, "transformers_version": "4.44.0", "use_mrope": False}
QWEN_14B = _QWEN_DISTILLED | {
    "hidden_size": 5120, "intermediate_size": 13824, "max_window_layers": 48, "num_attention_heads": 40,
    "num_hidden_layers": 48, "num_key_value_heads": 8}
QWEN_32B = _QWEN_DISTILLED | {
    "hidden_size": 5120, "intermediate_size": 27648, "max_window_layers": 64, "num_attention_heads": 40,
    "num_hidden_layers": 64, "num_key_value_heads": 8}

_LLAMA_DISTILLED = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 128256}
LLAMA_8B = _LLAMA_DISTILLED | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
    "transformers_version": "4.43.0.dev0"}
LLAMA_70B = _LLAMA_DISTILLED | {
    "head_dim": 128, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_hidden_layers": 80, "transformers_version": "4.47.0.dev0"}

_DEEPSEEK_LLM = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 100000, "eos_token_id": 100001, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 4096, "model_type": "llama", "pretraining_tp": 1,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "vocab_size": 102400}
LLM_7B = _DEEPSEEK_LLM | {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                          "num_hidden_layers": 30, "num_key_value_heads": 32}
LLM_67B = _DEEPSEEK_LLM | {"hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64,
                           "num_hidden_layers": 95, "num_key_value_heads": 8}

MOE_16B = {
    "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig",
                 "AutoModel": "modeling_deepseek.DeepseekModel",
                 "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "max_position_embeddings": 4096, "model_type": "deepseek", "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 28, "num_key_value_heads": 16, "pretraining_tp": 1,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": True,
    "vocab_size": 102400}

RELEASED = {
    "kimi-k2": KIMI_K2, "moonlight-16b-a3b": MOONLIGHT, "gigachat3-10b-a1.8b": GIGACHAT3, "deepseek-v3": V3_1,
    "deepseek-r1-distill-qwen-1.5b": QWEN_1_5B, "deepseek-r1-distill-qwen-7b": QWEN_7B,
    "deepseek-r1-distill-qwen-14b": QWEN_14B, "deepseek-r1-distill-qwen-32b": QWEN_32B,
    "deepseek-r1-distill-llama-8b": LLAMA_8B, "deepseek-r1-distill-llama-70b": LLAMA_70B,
    "deepseek-llm-7b": LLM_7B, "deepseek-llm-67b": LLM_67B, "deepseek-moe-16b": MOE_16B}
