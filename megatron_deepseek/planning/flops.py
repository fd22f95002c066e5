"""The arithmetic of a training step, for Model FLOPs Utilisation: what the model needs, not what a run spends.

Counted: every matrix product of the forward pass, two operations a multiply-add, times three for forward and
backward. Experts count where a token activates them (top-k and shared). Not counted: recomputation, norms, softmax,
rotary embedding, the embedding's look-up.

Attention counts whole rows of scores, without the half that the causal mask saves: the convention of DeepSeek's
published 43.7 % ("non-causal", Insights into DeepSeek-V3, arXiv 2505.09343, table 4), which at 432 TFLOPS and
1,542 tokens/s a GPU is 280.5e9 FLOPs a token. That number leaves the router and the MTP module out. Both are counted
here, because a step computes them: 281.1e9 without the MTP module of V3, 291.8e9 with it.
"""

import re

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import total

# Dense BF16 peak with float32 accumulation, FLOPs a second: half of what NVIDIA's data sheets give "with sparsity".
PEAK_BF16_FLOPS = {
    "GB300": 2500e12, "B300": 2250e12, "GB200": 2500e12, "B200": 2250e12, "B100": 1750e12,
    "GH200": 989e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "H20": 148e12,
    "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L20": 119.5e12, "L4": 121e12,
}
PEAK_OF_VARIANT = {("H100", "PCIE"): 756e12, ("H100", "NVL"): 835e12, ("H200", "NVL"): 835e12, ("H800", "PCIE"): 756e12}


def model_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """Return the FLOPs, forward and backward, of one token in a sequence of `seq_length`, MTP and its heads included.
    """
    forward = 2 * active_matmul_weights(config)
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    forward += blocks * attention_core_flops(config, seq_length)
    return 3.0 * forward


def active_matmul_weights(config: ModelConfig) -> int:
    """Count the weights that multiply a token: the activated parameters less the embedding, norms and biases.

    The head counts once for the model and once for each MTP module, which shares its weights but not its work.
    """
    return total(config, lambda row: row.gemms * row.active)


def attention_core_flops(config: ModelConfig, seq_length: int) -> int:
    """Return the forward FLOPs of one token's scores and weighted sum in a layer, against all `seq_length` keys."""
    return 2 * config.num_attention_heads * seq_length * (config.qk_head_dim + config.value_head_dim)


def peak_flops(device_name: str) -> float | None:
    """Return the dense BF16 FLOPs a second of a GPU by the name that CUDA gives it, None when it is not known.

    Names are compared word by word: "NVIDIA A100-SXM4-80GB" is an A100 and no A10.
    """
    words = re.split(r"[^A-Z0-9]+", device_name.upper())
    for (device, variant), flops in PEAK_OF_VARIANT.items():
        if device in words and variant in words:
            return flops
    return next((flops for device, flops in PEAK_BF16_FLOPS.items() if device in words), None)
