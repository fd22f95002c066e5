"""The angular speeds of rotary pairs: `rope_scaling` none, linear, dynamic NTK, YaRN (arXiv 2309.00071) or Llama 3's.

They are those of DeepSeek's modeling_deepseek.py, for latent attention, and transformers', for grouped-query attention.
The two differ in YaRN's temperature: the former divides it between cosines and sines and the softmax, the latter puts
all of it on cosines and sines.

Shapes: S positions, D rotary dimensions.
"""

import math

import torch

from megatron_deepseek.model.architecture.config import ModelConfig, RopeScaling


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's temperature: 0.1 mscale ln(factor) + 1, and 1 without stretching."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Return 1/sqrt(qk_head_dim); in latent attention times YaRN's mscale_all_dim squared (queries and keys carry one
    factor each).
    """
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if not config.grouped_query and scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _yarn_frequencies(base: float, dim: int, scaling: RopeScaling) -> torch.Tensor:
    """Return frequencies of which fast ones are kept, slow ones divided by `factor`, with a linear ramp between."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    extrapolated = 1.0 / base**exponents
    interpolated = 1.0 / (scaling.factor * base**exponents)

    def dimension_of(rotations: float) -> float:
        period = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(base))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), dim - 1)
    span = high - low or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return interpolated * ramp + extrapolated * (1 - ramp)


def _llama3_frequencies(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Return frequencies by wavelength: short ones are kept, long ones divided by `factor`, with a ramp between.

    The bounds are the original length over `high_freq_factor` and over `low_freq_factor`; the ramp is linear in the
    rotations that a pair makes within that length.
    """
    rotations = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def inverse_frequencies(config: ModelConfig, seq_length: int) -> torch.Tensor:
    """Return the angular speed of each pair, [D/2] float32. Only the dynamic kind depends on `seq_length`."""
    base, dim, scaling = config.rope_theta, config.rotary_dim, config.rope_scaling
    if scaling is not None and scaling.kind == "yarn":
        return _yarn_frequencies(base, dim, scaling)
    if scaling is not None and scaling.kind == "dynamic":
        length, limit = max(seq_length, config.max_position_embeddings), config.max_position_embeddings
        base = base * (scaling.factor * length / limit - (scaling.factor - 1)) ** (dim / (dim - 2))
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is not None and scaling.kind == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    return frequencies / scaling.factor if scaling is not None and scaling.kind == "linear" else frequencies


def _temperature(scaling: RopeScaling | None) -> float:
    """Return what cosines and sines are multiplied by: YaRN's ratio of mscales, unless `attention_factor` says it."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def rope_table(config: ModelConfig, seq_length: int, device: torch.device, dtype: torch.dtype = torch.float32
               ) -> torch.Tensor:
    """Return cos and sin of every position and pair, [2, S, D/2] of `dtype`, times YaRN's temperature.

    In float32 the angle between two positions depends on where they are, by rounding; in float64 on their distance.
    """
    with torch.device("cpu"):  # has values even while a model is being built on the meta device
        angles = torch.outer(torch.arange(seq_length, dtype=dtype), inverse_frequencies(config, seq_length).to(dtype))
        table = torch.stack([angles.cos(), angles.sin()])
    return (table * _temperature(config.rope_scaling)).to(device)
