"""The released models' FP8: float8_e4m3fn weights with one float32 scale for each block of 128 x 128.

    weight = fp8 * weight_scale_inv[row // 128, column // 128]

The scale is the block's largest magnitude / 448, in float32, and fp8 = weight / scale rounded to nearest even, as
DeepSeek's inference/kernel.py does for activations (github.com/deepseek-ai/DeepSeek-V3); README_WEIGHTS.md there
describes the format. What is kept in higher precision: embedding, head, norms, routers, biases and the MTP's eh_proj.
"""

import torch
import torch.nn.functional as F

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn
SCALE_SUFFIX = "_scale_inv"
QUANTIZATION_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                       "weight_block_size": [BLOCK, BLOCK]}
_NOT_QUANTIZED = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight", "eh_proj.weight",
                  "shared_head.head.weight")


def is_quantized(name: str) -> bool:
    """Whether the release format holds the weight `name` in FP8."""
    return name.endswith(".weight") and not name.endswith(_NOT_QUANTIZED)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of [out, in]: [ceil(out / 128), ceil(in / 128)]."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """[rows / 128, 128, columns / 128, 128], zeros beyond the edges."""
    rows, columns = scale_shape(x.shape)
    padded = F.pad(x, (0, columns * BLOCK - x.shape[1], 0, rows * BLOCK - x.shape[0]))
    return padded.view(rows, BLOCK, columns, BLOCK)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 weight and float32 scales of rows that begin at a multiple of 128. ValueError if any is not finite."""
    blocks = _blocks(weight.float())
    largest = blocks.abs().amax((1, 3))
    if not torch.isfinite(largest).all():
        raise ValueError("it has values that are not finite, which FP8 cannot hold")
    scale = largest / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)  # a block of zeros
    scaled = (blocks / scale[:, None, :, None]).clamp_(-LARGEST, LARGEST)
    rows, columns = weight.shape
    return scaled.view(-1, scaled.shape[2] * BLOCK)[:rows, :columns].to(torch.float8_e4m3fn), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 values of rows that begin at a multiple of 128, with the scales of their blocks."""
    rows, columns = weight.shape
    spread = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float().mul_(spread)
