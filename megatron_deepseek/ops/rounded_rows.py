"""Numbers of rows, rounded up where a kernel is compiled for every new shape.

oneDNN does so in bfloat16 on the CPU: that was measured to take 0.9 ms, four times as long as a GEMM of a group of rows
itself. So the number of rows becomes a power of two or a multiple of 64, of which there are few.
"""

import torch
import torch.nn.functional as F

from megatron_deepseek.device import on_accelerator
from megatron_deepseek.torch_private import multiplies_bfloat16

MULTIPLE = 64  # of which more rows than this become one


def compiles_for_each_shape(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether kernels are compiled for every new number of rows."""
    return dtype == torch.bfloat16 and device.type == "cpu" and multiplies_bfloat16()


def rounded(rows: int) -> int:
    """Return the number that `rows` is rounded up to; none stay none."""
    return 1 << (rows - 1).bit_length() if 0 < rows <= MULTIPLE else -(-rows // MULTIPLE) * MULTIPLE


def rows_of_kernel(x: torch.Tensor, rows: int) -> int:
    """Return how many rows a kernel is given for `rows` of those of x."""
    return rounded(rows) if not on_accelerator(x) and compiles_for_each_shape(x.device, x.dtype) else rows


def round_up(x: torch.Tensor) -> torch.Tensor:
    """Return x with zero rows appended where kernels are compiled for each shape, x itself elsewhere."""
    missing = rows_of_kernel(x, len(x)) - len(x)
    return F.pad(x, (0, 0, 0, missing)) if missing else x
