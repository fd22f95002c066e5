"""Conversion of a checkpoint between formats, in memory that does not grow with the model.

    source (huggingface.py, source.py) -> blocks of rows (blocks.py) -> files (output_file.py, building.py) -> SAVE

Every tensor passes under its Hugging Face name, a few rows at a time. formats.py says how each format is opened, and
which files it is written to.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.building import DirectoryBuild, Share, build_directory
from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.blocks import FP8, OutputTensor, check_copies
from megatron_deepseek.checkpoint.convert.output_file import OutputFile, WrittenTensor
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.inspection import checksum_checks
from megatron_deepseek.model.architecture.parameters import BIAS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": FP8}


@dataclass(frozen=True, eq=False)
class OutputFormat:
    """What a conversion writes: a model's `files` in the format `name` (hf, native, megatron, gguf), to `destination`.

    `write(path, file, advance)` writes a file and returns its fingerprint. `complete(directory, fingerprints)` adds
    what makes the files a checkpoint. `publish()` runs after the directory has got its name. `more`: on what else the
    files depend; a conversion that goes on after a kill begins anew if it has changed.
    """

    name: str
    destination: Path
    files: tuple[OutputFile, ...]
    write: Callable[[Path, OutputFile, Callable[[int], None]], Fingerprint]
    complete: Callable[[Path, dict[str, Fingerprint]], None]
    publish: Callable[[], None] = lambda: None
    more: str = ""

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True)
class Scales:
    """The format in which the scales of float8 weights are `wanted`, and the one in which the source's are `given`."""

    wanted: str = block_fp8.FLOAT32
    given: str = block_fp8.FLOAT32

    @classmethod
    def of(cls, fields: dict | None, asked: str | None) -> "Scales":
        """Return what is `asked` of a source with the config.json `fields`; by default that which the source has."""
        quantization = (fields or {}).get("quantization_config") or {}
        given = block_fp8.UE8M0 if quantization.get("scale_fmt") == block_fp8.UE8M0 else block_fp8.FLOAT32
        return cls(asked or given, given)

    def made(self, stored: torch.dtype) -> str | None:
        """Return the format of new scales for a weight that is `stored` so, None where it keeps those that it has.

        Powers of two are float32 numbers: they need not be made again where any value will do.
        """
        kept = stored == FP8 and (self.wanted == self.given or self.wanted == block_fp8.FLOAT32)
        return None if kept else self.wanted


def output_dtype(name: str, stored: torch.dtype, requested: torch.dtype | None, to_fp8: bool = True) -> torch.dtype:
    """Return the dtype that the tensor `name`, now `stored`, is written in.

    Without a request the stored dtype stays, but float8 becomes bfloat16 unless `to_fp8` says that the format written
    has float8. If fp8 is requested, what the release keeps in higher precision becomes bfloat16 unless it has 16 bits
    already. Router biases are never narrowed, since they decide between scores that are nearly equal.
    """
    if requested == FP8:
        if block_fp8.is_quantized(name):
            return FP8
        requested = stored if stored.itemsize == 2 else torch.bfloat16
    elif requested is None:
        requested = torch.bfloat16 if stored == FP8 and not to_fp8 else stored
    if name.endswith(BIAS) and requested.itemsize < stored.itemsize:
        return stored
    return requested


def output_tensors(source: TensorSource, requested: torch.dtype | None, to_fp8: bool, copies: dict[str, str],
                   scales: Scales = Scales()) -> list[OutputTensor]:
    """Return every tensor to write, in the order of the layers; `copies` maps further names to what each copies."""
    result = []
    for name in source.shapes:
        named = [name, *(copy for copy, original in copies.items() if original == name)]
        dtype = output_dtype(name, source.dtypes[name], requested, to_fp8)
        made = scales.made(source.dtypes[name]) if dtype == FP8 else None
        result += [OutputTensor(each, name, source.shapes[name], dtype, made) for each in named]
    return result


def convert(source: TensorSource, output: OutputFormat, share: Share, advance: Callable[[int], None],
            say: Callable[[str], None]) -> None:
    """Write `output` from `source`; raise ValueError, and leave no `output.destination`, if anything is wrong."""
    build_directory(conversion_build(source, output), share, advance, say)


def conversion_build(source: TensorSource, output: OutputFormat) -> DirectoryBuild:
    """Return the directory to build, with its checks.

    Copies are compared with their originals, and a native checkpoint's files with their checksums.
    """
    contents = [output.name, output.more, [[file.name, [_plan(tensor) for tensor in file.tensors]]
                                           for file in output.files]]
    checksums = checksum_checks(source.path)
    check_bytes = sum(source.dtypes[original].itemsize * prod(source.shapes[original])
                      for original in source.copies.values())
    check_bytes += sum(path.stat().st_size for path in source.files()) if checksums else 0
    return DirectoryBuild("conversion", output.destination, output.files, source.files(), contents, output.write,
                          output.complete, output.publish, [partial(check_copies, source), *checksums], check_bytes)


def _plan(tensor: WrittenTensor) -> list[str | None]:
    return [tensor.name, tensor.original, str(tensor.dtype), getattr(tensor, "scale_format", None)]


def dtype_bytes(files: tuple[OutputFile, ...]) -> dict[torch.dtype, int]:
    """Count the bytes of each dtype that are written."""
    total: Counter = Counter()
    for file in files:
        for tensor in file.tensors:
            total[tensor.dtype] += tensor.nbytes
    return dict(total)
