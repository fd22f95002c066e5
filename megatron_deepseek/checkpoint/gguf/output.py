"""A model as GGUF files, which llama.cpp and the programs around it load: the tokenizer and all settings are in them.

The package gguf writes a file's header: keys, and where each tensor is. The numbers are written here a block of rows at
a time, since its own writer takes whole tensors, which of stacked experts are gigabytes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUF_DEFAULT_ALIGNMENT, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, size_label
from gguf.constants import Keys
from gguf.quants import quantize

from megatron_deepseek.checkpoint.convert.assets import Assets
from megatron_deepseek.checkpoint.convert.block_fp8 import BLOCK
from megatron_deepseek.checkpoint.convert.blocks import FP8, cast, row_ranges
from megatron_deepseek.checkpoint.convert.conversion import OutputFormat
from megatron_deepseek.checkpoint.convert.output_file import OutputFile, divide
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.dcp.item_file import FileWriter
from megatron_deepseek.checkpoint.destination import stay_outside
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.gguf.architectures import architecture_of, check_supported
from megatron_deepseek.checkpoint.gguf.keys import add_architecture, add_general, add_vocabulary
from megatron_deepseek.checkpoint.gguf.tensors import INTERLEAVED, TRANSPOSED, GgufTensor, Part, gguf_tensors
from megatron_deepseek.checkpoint.gguf.vocabulary import Vocabulary, read_vocabulary
from megatron_deepseek.checkpoint.safetensors_file import as_bytes
from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.model.architecture.config import ModelConfig

TYPES = {"fp32": GGMLQuantizationType.F32, "fp16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16,
         "q8_0": GGMLQuantizationType.Q8_0}
_OF_TORCH = {torch.float32: "fp32", torch.float64: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", FP8: "bf16"}
_TORCH = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16,
          GGMLQuantizationType.BF16: torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Header:
    """What the header of each file is made of; the first file has all of it. `size` is that of the model, in words."""

    name: str
    size: str
    config: ModelConfig
    kind: GGMLQuantizationType
    vocabulary: Vocabulary
    generation: Mapping[str, Any]

    def fill(self, writer: GGUFWriter) -> None:
        """Add all keys."""
        add_general(writer, self.name, self.size, self.kind, self.generation)
        add_architecture(writer, self.config)
        add_vocabulary(writer, self.vocabulary, self.config.vocab_size)


def gguf_output(source: TensorSource, assets: Assets, save: Path, dtype: str | None, largest: int | None,
                pre_tokenizer: str | None) -> OutputFormat:
    """Return the output as GGUF: one file, or several if each may have at most `largest` bytes.

    `dtype`: a key of TYPES, by default the type of most weights, BF16 of those in FP8. `pre_tokenizer`: llama.cpp's
    name of how texts are cut, by default that of the tokenizer. Raise ValueError for what llama.cpp cannot have.
    """
    stay_outside(save)
    if save.suffix == ".gguf":
        raise ValueError(f"--save {save} is to be a directory: the GGUF files in it get names")
    check_supported(source.config)
    kind = TYPES[dtype or _OF_TORCH[_commonest(source)]]
    directory = assets.directory or source.path
    vocabulary = read_vocabulary(directory, pre_tokenizer, assets.chat_template)
    _check_vocabulary(vocabulary, source.config, directory)
    tensors = gguf_tensors(source.config, source.shapes, kind)
    header = Header(save.name, _size(tensors), source.config, kind, vocabulary, _generation(directory))
    groups = [tuple(tensors)] if largest is None else divide(tensors, largest)
    files = tuple(OutputFile(_file_name(kind, number, len(groups)), group) for number, group in enumerate(groups))

    def write(path: Path, file: OutputFile, advance: Callable[[int], None]) -> Fingerprint:
        return write_gguf(path, files, files.index(file), header, source, advance)

    return OutputFormat("gguf", save, files, write, lambda directory, fingerprints: None,
                        more=repr((header.config, header.vocabulary, sorted(header.generation.items()))))


def _commonest(source: TensorSource) -> torch.dtype:
    """Return the type of most of the weights' numbers."""
    numbers: Counter = Counter()
    for name, shape in source.shapes.items():
        numbers[source.dtypes[name]] += torch.Size(shape).numel()
    return numbers.most_common(1)[0][0]


def _size(tensors: Sequence[GgufTensor]) -> str:
    """Return the number of parameters as files of GGUF are labelled, such as 64x1.5B of a model with experts."""
    counter = GGUFWriter(None, "")
    _add_tensors(counter, tensors)
    return size_label(*counter.get_total_parameter_count())


def _check_vocabulary(vocabulary: Vocabulary, config: ModelConfig, directory: Path) -> None:
    if len(vocabulary.tokens) > config.vocab_size:
        raise ValueError(f"--to gguf: the tokenizer of {directory} has {len(vocabulary.tokens)} entries, the model "
                         f"{config.vocab_size}")


def _generation(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    return dict(read_object(path).fields) if path.is_file() else {}


def _file_name(kind: GGMLQuantizationType, number: int, count: int) -> str:
    """Return a name by which llama.cpp finds the other files of a model from its first."""
    return f"model-{kind.name}.gguf" if count == 1 else f"model-{kind.name}-{number + 1:05d}-of-{count:05d}.gguf"


def write_gguf(path: Path, files: Sequence[OutputFile], number: int, header: Header, source: TensorSource,
               advance: Callable[[int], None]) -> Fingerprint:
    """Write file `number` of `files` to `path` and return its fingerprint."""
    begin = _header_bytes(path, files, number, header)
    with FileWriter(path) as writer:
        writer.write(begin)
        for tensor in files[number].tensors:
            writer.tensor = tensor.name
            for data in _tensor_bytes(source, tensor):
                writer.write(data)
                advance(len(data))
            writer.write(bytes(-writer.position % GGUF_DEFAULT_ALIGNMENT))
    return Fingerprint(writer.position, [(0, writer.position, writer.checksum.result().digest)])


def _header_bytes(path: Path, files: Sequence[OutputFile], number: int, header: Header) -> bytes:
    """Return all that comes before the numbers of a file; the file at `path` is left with just that."""
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture_of(header.config)])
    if number == 0:
        header.fill(writer)
    if len(files) > 1:
        writer.add_uint16(Keys.Split.LLM_KV_SPLIT_NO, number)
        writer.add_uint16(Keys.Split.LLM_KV_SPLIT_COUNT, len(files))
        writer.add_int32(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, sum(len(file.tensors) for file in files))
    _add_tensors(writer, files[number].tensors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    data = path.read_bytes()
    return data + bytes(-len(data) % GGUF_DEFAULT_ALIGNMENT)


def _add_tensors(writer: GGUFWriter, tensors: Sequence[GgufTensor]) -> None:
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.nbytes, raw_dtype=tensor.kind)


def _tensor_bytes(source: TensorSource, tensor: GgufTensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, a block of rows at a time."""
    if not tensor.parts:
        yield as_bytes(torch.tensor(tensor.values, dtype=torch.float32))
    for part in tensor.parts:
        for rows in _blocks(source, part):
            yield _encode(tensor, rows)


def _blocks(source: TensorSource, part: Part) -> Iterator[torch.Tensor]:
    """Yield the numbers of a part in the order in which they are written; a head's rows at once unless STORED."""
    if part.order == TRANSPOSED:
        yield _read(source, part.name, part.start, part.stop).T.contiguous()
    elif part.order == INTERLEAVED:
        rows = _read(source, part.name, part.start, part.stop)
        yield rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    else:
        for start, stop in row_ranges(source.shapes[part.name], part.start, part.stop, BLOCK):
            yield _read(source, part.name, start, stop)


def _read(source: TensorSource, name: str, start: int, stop: int) -> torch.Tensor:
    """Read rows of a weight; FP8 is read from the beginning of a block of scales on."""
    if source.dtypes[name] != FP8:
        return source.read(name, start, stop)
    begin = start - start % BLOCK
    return source.read(name, begin, stop)[start - begin:]


def _encode(tensor: GgufTensor, rows: torch.Tensor) -> memoryview:
    if tensor.kind in _TORCH:
        return as_bytes(cast(tensor.name, rows, _TORCH[tensor.kind]).contiguous())
    return memoryview(quantize(rows.float().numpy(), tensor.kind).reshape(-1))
