"""Conversion of a checkpoint between formats, in memory that does not grow with the model.

    source (huggingface.py, native, megatron.py) -> blocks of rows -> shards, one file each (building.py) -> SAVE

Every tensor passes under its Hugging Face name, a few rows at a time.
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
from megatron_deepseek.checkpoint.convert.blocks import FP8, Output, check_copies
from megatron_deepseek.checkpoint.convert.output_file import OutputFile
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.inspection import checks_of
from megatron_deepseek.model.architecture.parameters import BIAS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": FP8}


@dataclass(frozen=True, eq=False)
class OutputFormat:
    """A format to write. `destination` is made by one rename of the finished files' directory.

    `write(path, shard, advance)` writes a file; `complete(directory, fingerprints)` adds what makes the files a
    checkpoint; `publish()` runs after the rename.
    """

    kind: str
    destination: Path
    shards: tuple[OutputFile, ...]
    write: Callable[[Path, OutputFile, Callable[[int], None]], Fingerprint]
    complete: Callable[[Path, dict[str, Fingerprint]], None]
    publish: Callable[[], None] = lambda: None

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def output_dtype(name: str, stored: torch.dtype, requested: torch.dtype | None, to_fp8: bool = True) -> torch.dtype:
    """What the tensor `name` becomes. Router biases are never narrowed: they decide between near-equal scores.

    Under fp8, what the release keeps in higher precision becomes bfloat16 unless it has 16 bits already. Without a
    request the stored type stays, float8 becomes bfloat16 where the target has no float8.
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


def outputs(source: TensorSource, requested: torch.dtype | None, to_fp8: bool, copies: dict[str, str]) -> list[Output]:
    """Everything to write, in the order of the layers; `copies`: further names, and what each is a copy of."""
    result = []
    for name in source.shapes:
        named = [name, *(copy for copy, original in copies.items() if original == name)]
        dtype = output_dtype(name, source.dtypes[name], requested, to_fp8)
        result += [Output(each, name, source.shapes[name], dtype) for each in named]
    return result


def convert(source: TensorSource, target: OutputFormat, share: Share, advance: Callable[[int], None],
            say: Callable[[str], None]) -> None:
    """Write `target` from `source`. ValueError, and no `target.destination`, where anything is wrong."""
    build_directory(conversion(source, target), share, advance, say)


def conversion(source: TensorSource, target: OutputFormat) -> DirectoryBuild:
    """What there is to make. Copies are checked first, and a native checkpoint's files against their checksums."""
    contents = [target.kind, [[shard.name, [[output.name, output.original, str(output.dtype)]
                                            for output in shard.outputs]] for shard in target.shards]]
    checksums = checks_of(source.path)
    check_bytes = sum(source.dtypes[original].itemsize * prod(source.shapes[original])
                      for original in source.copies.values())
    check_bytes += sum(path.stat().st_size for path in source.files()) if checksums else 0
    return DirectoryBuild("conversion", target.destination, target.shards, source.files(), contents, target.write,
                   target.complete, target.publish, [partial(check_copies, source), *checksums], check_bytes)


def dtype_bytes(shards: tuple[OutputFile, ...]) -> dict[torch.dtype, int]:
    """Bytes written of each type."""
    total: Counter = Counter()
    for shard in shards:
        for output in shard.outputs:
            total[output.dtype] += output.nbytes
    return dict(total)

