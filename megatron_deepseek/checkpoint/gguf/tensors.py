"""The tensors of a GGUF file: llama.cpp's names, shapes and order of numbers, and the weights that each is made of.

Experts are stacked. MLA's kv_b_proj becomes two tensors, each of one matrix per head: k_b, transposed, because
llama.cpp multiplies queries by it (absorbed attention), and v_b. Llama's queries and keys have the rows of a head in
the order in which its rotary embedding takes pairs. Names come from the package gguf, as in llama.cpp's own converter.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import pi, prod

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, TensorNameMap, get_tensor_name_map

from megatron_deepseek.checkpoint.convert.names import layer_of
from megatron_deepseek.checkpoint.gguf.architectures import architecture_of
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.fields import RopeScaling
from megatron_deepseek.model.architecture.parameters import BIAS

# How the rows of a part are written: as they are stored; columns before rows; or the two halves of a head in turns.
STORED, TRANSPOSED, INTERLEAVED = "stored", "transposed", "interleaved"
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)\d+\.(\w+\.weight)")
_ALWAYS_FLOAT32 = ("_norm.weight", ".ffn_gate_inp.weight")  # llama.cpp computes with these in float32 alone


@dataclass(frozen=True)
class Part:
    """Rows start..stop of the weight `name`, written in `order` (STORED, TRANSPOSED or INTERLEAVED)."""

    name: str
    start: int
    stop: int
    order: str = STORED


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file. `shape` is in PyTorch's order; the file has it reversed.

    Its numbers are those of `parts`, one after another, or `values` where there are no parts. `kind` is their type.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    parts: tuple[Part, ...]
    values: tuple[float, ...] = ()

    @property
    def original(self) -> str | None:
        """Return the first weight that it is made of, None if it is made of none."""
        return self.parts[0].name if self.parts else None

    @property
    def dtype(self) -> str:
        return self.kind.name

    @property
    def layer(self) -> int | None:
        return layer_of(self.original) if self.parts else None

    @property
    def nbytes(self) -> int:
        numbers, nbytes = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // numbers * nbytes


def gguf_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], kind: GGMLQuantizationType
                 ) -> list[GgufTensor]:
    """Return the tensors of a model in the order of its layers, matrices in the type `kind`.

    `shapes` maps the weights' Hugging Face names to their shapes. Vectors, norms, routers and biases are F32. A matrix
    whose rows are no multiple of the type's block (32 numbers of Q8_0) is F16, as llama.cpp's converter has it.
    """
    names = get_tensor_name_map(architecture_of(config), config.num_hidden_layers)
    found = [GgufTensor("rope_freqs.weight", (len(factors),), GGMLQuantizationType.F32, (), factors)
             for factors in [_rope_factors(config)] if factors]
    for stem, weights in _stacks(shapes).items():
        for name, shape, parts in _arranged(config, stem, weights, shapes[weights[0]]):
            called = _name(names, name)
            found.append(GgufTensor(called, shape, _kind(called, shape, kind), tuple(parts)))
    return found


def _stacks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Return the weights that become one stacked tensor, by its name; experts in the order of their numbers."""
    stacks: dict[str, list[str]] = {}
    for name in shapes:
        stacks.setdefault(_EXPERT.sub(r"\1\2", name), []).append(name)
    return stacks


def _arranged(config: ModelConfig, stem: str, weights: list[str], shape: tuple[int, ...]
              ) -> Iterator[tuple[str, tuple[int, ...], list[Part]]]:
    """Yield name, shape and parts of each tensor that `weights`, of this shape each, become."""
    if stem.endswith("kv_b_proj.weight"):
        yield from _key_and_value(config, stem)
        return
    order, rows = STORED, shape[0]
    if config.model_type in ("llama", "deepseek") and re.search(r"\.[qk]_proj\.", stem):
        order, rows = INTERLEAVED, config.head_dim
    parts = [Part(name, start, start + rows, order) for name in weights for start in range(0, shape[0], rows)]
    yield stem, (len(weights), *shape) if _EXPERT.fullmatch(weights[0]) else shape, parts


def _key_and_value(config: ModelConfig, stem: str) -> Iterator[tuple[str, tuple[int, ...], list[Part]]]:
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    starts = [head * (nope + value) for head in range(heads)]
    yield (stem.replace("kv_b_proj", "k_b_proj"), (heads, rank, nope),
           [Part(stem, start, start + nope, TRANSPOSED) for start in starts])
    yield (stem.replace("kv_b_proj", "v_b_proj"), (heads, value, rank),
           [Part(stem, start + nope, start + nope + value) for start in starts])


def _name(names: TensorNameMap, name: str) -> str:
    """Return llama.cpp's name of a tensor; the bias of a router has a name of its own there."""
    found = names.get_name(name.replace("." + BIAS, ".e_score_correction.bias"), try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def _kind(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1 or name.endswith(_ALWAYS_FLOAT32):
        return GGMLQuantizationType.F32
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _rope_factors(config: ModelConfig) -> tuple[float, ...]:
    """Return by what Llama 3 divides each rotary frequency (arXiv 2407.21783), () for another embedding.

    Short wavelengths stay, long ones are stretched by the factor, and between the two it rises smoothly.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return ()
    exponents = (2 * pair / config.head_dim for pair in range(config.head_dim // 2))
    return tuple(_rope_factor(2 * pi * config.rope_theta ** exponent, scaling) for exponent in exponents)


def _rope_factor(wavelength: float, scaling: RopeScaling) -> float:
    turns = scaling.original_max_position_embeddings / wavelength
    if turns > scaling.high_freq_factor:
        return 1.0
    if turns < scaling.low_freq_factor:
        return scaling.factor
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return 1 / ((1 - smooth) / scaling.factor + smooth)
