"""A Hugging Face directory as the source of a conversion: every tensor in its safetensors files accounted for."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.mtp import INCOMPLETE, LEFT_OUT, as_stored, module_prefixes
from megatron_deepseek.checkpoint.convert.names import hf_shapes, layer_of, mtp_copies
from megatron_deepseek.checkpoint.convert.source import FLOATS
from megatron_deepseek.checkpoint.safetensors_file import StoredTensor, read_header, read_rows, stream_rows
from megatron_deepseek.foreign_json import LARGEST_LIST, JsonObject, read_object
from megatron_deepseek.model.architecture.config import ModelConfig

INDEX = "model.safetensors.index.json"
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, eq=False)
class HuggingFaceSource:
    """A Hugging Face directory as a source.TensorSource.

    `stored` has every tensor of the files by name, scales included. `fields` is config.json as it was read.
    """

    path: Path
    config: ModelConfig
    fields: dict
    stored: dict[str, StoredTensor]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    copies: dict[str, str]
    dropped: dict[str, str]
    absent_mtp: int = 0

    @property
    def powers_of_two(self) -> bool:
        """Return whether config.json says so of the scales of FP8 weights."""
        return (self.fields.get("quantization_config") or {}).get("scale_fmt") == block_fp8.UE8M0

    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.stored.values()})

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if self.stored[name].dtype == _FP8:
            return block_fp8.dequantize(*self.read_fp8(name, start, stop))
        return read_rows(self.stored[name], start, stop)

    def stream(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        return stream_rows(self.stored[name], start, stop)

    def read_fp8(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert start % block_fp8.BLOCK == 0, start
        scales = read_rows(self.stored[name + block_fp8.SCALE_SUFFIX], start // block_fp8.BLOCK,
                           -(-stop // block_fp8.BLOCK))
        if self.powers_of_two:
            block_fp8.check_powers_of_two(name, scales.float())
        return read_rows(self.stored[name], start, stop), scales.float()


def open_huggingface(path: Path, without_mtp: bool = False) -> HuggingFaceSource:
    """Open a Hugging Face directory.

    Raise ValueError, naming tensor and file, for a tensor that is damaged, missing, unknown, double or wrongly shaped.
    """
    config = ModelConfig.from_file(path / "config.json")
    fields = dict(read_object(path / "config.json").fields)
    stored = _all_tensors(path)
    _check_index(path, stored)
    _check_quantization(path, fields)
    config, absent, dropped = _without_absent_mtp(config, stored, without_mtp)
    shapes, copies = hf_shapes(config), mtp_copies(config)
    if config.tie_word_embeddings:
        copies["lm_head.weight"] = "model.embed_tokens.weight"
    copies = {name: original for name, original in copies.items() if name in stored}
    dropped |= {name: "computed from config.json" for name in stored if _COMPUTED.fullmatch(name)}
    dropped |= _dropped_scales(stored, dropped)
    _check_names(path, stored, shapes, copies, dropped, tuple(module_prefixes(config)))
    for name in [*shapes, *copies]:
        _check_tensor(stored, name, shapes[copies.get(name, name)])
    dtypes = {name: stored[name].dtype for name in shapes}
    return HuggingFaceSource(path, config, fields, stored, shapes, dtypes, copies, dropped, absent)


def _all_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of every safetensors file there; raise ValueError if two files have the same one."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} has no *.safetensors file")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in stored:
                raise ValueError(f"{name} is in two files, {stored[name].file} and {file}")
            stored[name] = tensor
    return stored


def _check_index(path: Path, stored: dict[str, StoredTensor]) -> None:
    index = path / INDEX
    if not index.exists():
        return
    weight_map = read_object(index, LARGEST_LIST).object("weight_map")
    names = sorted(weight_map.fields)
    for name in names:
        file = path / weight_map.text(name)
        if not file.is_file():
            raise ValueError(f"{file} is missing: {index.name} says that {name} is in it")
        if name not in stored or stored[name].file != file:
            raise ValueError(f"{name} is not in {file}, where {index.name} says it is")
    for name in sorted(set(stored) - set(names)):
        raise ValueError(f"{name} is in {stored[name].file}, but not in {index.name}")


def _check_quantization(path: Path, fields: dict) -> None:
    block = [block_fp8.BLOCK, block_fp8.BLOCK]
    quantization = JsonObject.of(fields, path / "config.json").object("quantization_config", default=None)
    if quantization is None:
        return
    method, given = quantization.fields.get("quant_method"), quantization.fields.get("weight_block_size")
    if method != "fp8" or given != block:
        raise ValueError(f"{path / 'config.json'}: quantization_config has quant_method {method!r} and "
                         f"weight_block_size {given}; only 'fp8' with {block} is known")


def _without_absent_mtp(config: ModelConfig, stored: dict, without_mtp: bool
                        ) -> tuple[ModelConfig, int, dict[str, str]]:
    """Return the architecture to read, how many announced modules are absent, and the tensors left out with why."""
    modules = tuple(module_prefixes(config))
    in_files = any((layer_of(name) or 0) >= config.num_hidden_layers for name in stored)
    read, absent = as_stored(config, in_files, without_mtp)
    left_out = [name for name in stored if name.startswith(modules)] if read != config else []
    return read, absent, dict.fromkeys(left_out, LEFT_OUT)


def _dropped_scales(stored: dict, dropped: dict[str, str]) -> dict[str, str]:
    scales = {name + block_fp8.SCALE_SUFFIX: reason for name, reason in dropped.items()}
    return {name: reason for name, reason in scales.items() if name in stored}


def _check_names(path: Path, stored: dict[str, StoredTensor], shapes: dict, copies: dict, dropped: dict,
                 modules: tuple[str, ...]) -> None:
    scales = {name + block_fp8.SCALE_SUFFIX for name in [*shapes, *copies]
              if name in stored and stored[name].dtype == _FP8}
    missing = sorted((set(shapes) | scales) - set(stored))
    if missing:
        of_mtp = all(name.startswith(modules) for name in missing)
        raise ValueError(f"{path} lacks {len(missing)} tensor{'s' * (len(missing) > 1)} that config.json asks for, "
                         f"first {missing[0]}" + (f"; {INCOMPLETE}" if of_mtp else ""))
    unknown = sorted(set(stored) - set(shapes) - set(copies) - set(dropped) - scales)
    if unknown:
        raise ValueError(f"{stored[unknown[0]].file} has {unknown[0]}, which is no tensor of the architecture in "
                         f"{path / 'config.json'} ({len(unknown)} such)")


def _check_tensor(stored: dict[str, StoredTensor], name: str, shape: tuple[int, ...]) -> None:
    tensor = stored[name]
    if tensor.shape != shape:
        raise ValueError(f"{tensor.file}: {name} has shape {tensor.shape}, config.json says {shape}")
    if tensor.dtype == _FP8:
        scale = stored[name + block_fp8.SCALE_SUFFIX]
        if scale.dtype not in (*FLOATS, torch.float8_e8m0fnu):
            raise ValueError(f"{scale.file}: {scale.name} is of type {scale.dtype}, no floating-point number")
        if len(shape) != 2 or scale.shape != block_fp8.scale_shape(shape):
            raise ValueError(f"{scale.file}: {scale.name} has shape {scale.shape}, "
                             f"one scale for each 128 x 128 block of {shape} was expected")
    elif tensor.dtype not in FLOATS:
        raise ValueError(f"{tensor.file}: {name} is of type {tensor.dtype}, no floating-point number")
