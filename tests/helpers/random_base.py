"""A base without files: random weights under Hugging Face's names, the same for every rank, some of them in FP8."""

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import nn

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.names import hf_shapes
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.ops.frozen_weight import FrozenWeight


@dataclass(frozen=True)
class RandomBase:
    """What reading frozen weights asks of a source. `released`: linear layers are stored in FP8."""

    config: ModelConfig
    std: float = 0.2
    released: bool = False

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: torch.float8_e4m3fn if self.released else torch.float32 for name in hf_shapes(self.config)}

    def whole(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        return torch.randn(hf_shapes(self.config)[name], generator=generator) * self.std

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return block_fp8.dequantize(*self.read_fp8(name, start, stop)) if self.released else \
            self.whole(name)[start:stop]

    def read_fp8(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = block_fp8.quantize(self.whole(name))
        return codes[start:stop], scales[start // block_fp8.BLOCK:-(-stop // block_fp8.BLOCK)]


def held_numbers(stage: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """What the bytes of this rank stand for, of a stage that one rank has all of."""
    return {held.row.name: FrozenWeight(held.form, *(getattr(each, "_local_tensor", each).detach() for each in (
        held.codes, held.scales))).dense(dtype) for held in stage.held}
