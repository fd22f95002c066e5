"""The FP8 format of the released models: float8_e4m3fn weights with one float32 scale for each block of 128 x 128.

    weight = fp8 * weight_scale_inv[row // 128, column // 128]

Training quantises its weights by the same code (ops/fp8/encoding.py): the scale is the block's largest magnitude / 448,
in float32, and fp8 = weight / scale rounded to nearest even, as DeepSeek's inference/kernel.py does for activations
(github.com/deepseek-ai/DeepSeek-V3); README_WEIGHTS.md there describes the format. Embedding, head, norms, routers,
biases and the MTP's eh_proj are kept in higher precision.

V3.1 has scales that are powers of two, `scale_fmt` "ue8m0" in its config.json: largest magnitude / 448, rounded up.
Kernels of Blackwell GPUs take no others. They too are stored as float32, or in later releases as their exponents alone.
"""

import torch

from megatron_deepseek.ops.fp8 import encoding

BLOCK = encoding.TILE
SCALE_SUFFIX = "_scale_inv"
FLOAT32, UE8M0 = "float32", "ue8m0"  # formats of scales: of any value, or powers of two
SCALE_FORMATS = (FLOAT32, UE8M0)
QUANTIZATION_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                       "weight_block_size": [BLOCK, BLOCK]}
_NOT_QUANTIZED = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight", "eh_proj.weight",
                  "shared_head.head.weight", "score.weight")


def is_quantized(name: str) -> bool:
    """Return whether the release format holds the weight `name` in FP8."""
    return name.endswith(".weight") and not name.endswith(_NOT_QUANTIZED)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the scales of a weight [out, in]: [ceil(out / 128), ceil(in / 128)]."""
    return encoding.num_tiles(shape[0]), encoding.num_tiles(shape[1])


def quantize(weight: torch.Tensor, scale_format: str = FLOAT32) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows that begin at a multiple of 128 to a float8 weight and its float32 scales.

    Raise ValueError if a value is not finite.
    """
    quantized, scale = encoding.quantize_128x128(weight, power_of_two=scale_format == UE8M0)
    if scale.isnan().any():
        raise ValueError("it has values that are not finite, which FP8 cannot hold")
    return quantized, scale


def check_powers_of_two(name: str, scale: torch.Tensor) -> None:
    """Raise ValueError unless the scales of the weight `name` are what scale_fmt "ue8m0" promises to kernels."""
    wrong = scale[torch.frexp(scale).mantissa != 0.5]
    if wrong.numel():
        raise ValueError(f"{name} has a scale of {wrong[0].item():g}, which is no power of two, although scale_fmt "
                         f"{UE8M0!r} in config.json says that all are: remove scale_fmt there")


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of float8 rows that begin at a multiple of 128, with the scales of their blocks."""
    return encoding.dequantize_128x128(weight, scale.float())
