"""How long a GPU takes for a product, for attention and for what only moves memory: a roofline with efficiencies.

A product reaches `reached_bf16` or `reached_fp8` of its GPU's peak (gpus.json) where its matrices are large, and less
by the table below where one dimension is small: medians of 514 products and 108 grouped ones that were measured on a
B200 (MooreThreads/SimuMax configs/system/b200_bf16_ceperm.json, read in 2026-11), over the median of large products,
by the smallest of the three dimensions. Of a grouped product that of one group counts.

Attention and what moves memory are H800's in the trace of deepseek-ai/profile-data: flash attention ran at 556 TFLOPS
forwards and 404 backwards (of 989). Of 124.3 ms of computing in a pair of forward and backward of 4 MoE layers 75.6
were products and 22 attention, so the rest takes as long as so many passes over what a layer keeps.
"""

from bisect import bisect_right
from dataclasses import dataclass
from math import log

from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.products import Product

PLAIN = ((128, 0.38), (256, 0.50), (512, 0.91), (1024, 1.0))  # (smallest dimension, part of what large ones reach)
GROUPED = ((128, 0.30), (256, 0.50), (512, 0.66), (1024, 0.82), (2048, 0.95), (4096, 1.0))
ATTENTION_FORWARD, ATTENTION_BACKWARD = 0.56, 0.41
ATTENTION_BACKWARD_FLOPS = 2.5  # products of its backward over those of its forward: scores are made again
MEMORY = 0.8  # of the peak, in copies of large tensors
PASSES_FORWARD, PASSES_BACKWARD = 3.0, 6.0  # over what a layer keeps: norms, rotation, SwiGLU, quantisation, order
LAUNCH = 5e-6  # seconds before a kernel runs, where none is queued behind another


@dataclass(frozen=True)
class Rates:
    """A GPU's speeds as a plan takes them: FLOPs and bytes a second."""

    gpu: Gpu

    def product(self, product: Product, element: int) -> float:
        """Return the seconds of one product whose numbers have `element` bytes."""
        if not product.rows:
            return 0.0
        gpu, narrow = self.gpu, product.fp8 and self.gpu.fp8_tflops is not None
        peak = (gpu.fp8_tflops * gpu.reached_fp8 if narrow else gpu.bf16_tflops * gpu.reached_bf16) * 1e12
        size = 1 if narrow else element
        smallest = min(product.rows / product.groups, product.columns, product.width)
        part = part_reached(smallest, GROUPED if product.groups > 1 else PLAIN)
        moved = size * (product.rows * product.width + product.groups * product.columns * product.width)
        moved += element * product.rows * product.columns
        slower = element / 2 if not narrow else 1.0  # float32: at best half as fast
        return max(slower * product.flops / (peak * part), self.memory(moved)) + LAUNCH

    def attention(self, flops: float, backward: bool) -> float:
        """Return the seconds of attention's core, given the FLOPs of its forward."""
        if backward:
            return ATTENTION_BACKWARD_FLOPS * flops / (ATTENTION_BACKWARD * self.gpu.bf16_tflops * 1e12)
        return flops / (ATTENTION_FORWARD * self.gpu.bf16_tflops * 1e12)

    def memory(self, moved: float) -> float:
        """Return the seconds in which so many bytes go through the GPU's memory."""
        return moved / (MEMORY * self.gpu.memory_tb_s * 1e12)

    def host(self, moved: float) -> float:
        """Return the seconds in which so many bytes go to the host's memory or come from there."""
        return moved / (self.gpu.host_gb_s * 1e9)


def part_reached(size: float, table: tuple[tuple[int, float], ...]) -> float:
    """Return the part of large products' speed at a smallest dimension of `size`, between entries by its logarithm.
    Below the first it falls with the size, as tiles are filled less.
    """
    sizes = [each for each, _ in table]
    at = bisect_right(sizes, size)
    if at == 0:
        return max(table[0][1] * size / sizes[0], 1e-4)
    if at == len(table):
        return table[-1][1]
    (low, below), (high, above) = table[at - 1], table[at]
    return below + (above - below) * log(size / low) / log(high / low)
