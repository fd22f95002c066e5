"""How rotary embeddings are stretched to more positions than a model was trained on: the values, with their checks."""

from dataclasses import dataclass

ROPE_KINDS = ("linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past `original_max_position_embeddings` (YaRN: arXiv 2309.00071).

    `kind` is Hugging Face's `rope_type`: one of ROPE_KINDS. `factor` applies to all, the two `freq_factor` to llama3,
    the others to yarn. `attention_factor`, of grouped-query attention alone, is what cosines and sines are multiplied
    by; None leaves it to the mscales.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope_scaling type {self.kind!r} is not one of {', '.join(ROPE_KINDS)}")
        if self.factor < 1:
            raise ValueError(f"rope_scaling factor {self.factor} is smaller than 1")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope_scaling low_freq_factor {self.low_freq_factor} is not between 0 and "
                             f"high_freq_factor {self.high_freq_factor}")
