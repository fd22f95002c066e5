"""The dense models that were distilled from R1: their shapes, and what training and serving them takes under ZeRO-3.

They are Qwen2.5 and Llama 3 models, which this project does not train yet; their sizes are planned so that one page
answers for the family. Bytes follow engines.py: 2 + 4 + 12 a parameter, all divided, two layers gathered at once,
layers recomputed wholly.
"""

from dataclasses import dataclass

from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.overheads import CONTEXT, FRAGMENTS, NCCL_FIRST, NCCL_GROUP
from megatron_deepseek.planning.tasks import NF4

LORA_RANK = 16


@dataclass(frozen=True)
class DenseModel:
    """A transformer with grouped-query attention, heads of 128; `bias`: of the products of queries, keys and values."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int
    bias: bool

    @property
    def layer_parameters(self) -> int:
        """Return the weights of a layer."""
        head = 128
        own = self.hidden * head * (2 * self.heads + 2 * self.kv_heads) + 3 * self.hidden * self.width + 2 * self.hidden
        return own + self.bias * head * (self.heads + 2 * self.kv_heads)

    @property
    def parameters(self) -> int:
        """Return all weights; embedding and head are two."""
        return self.layers * self.layer_parameters + 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def cache_bytes(self) -> int:
        """Return what all layers cache of a token in bf16: keys and values."""
        return self.layers * 2 * self.kv_heads * 128 * 2

    def layer_activations(self, tokens: int) -> int:
        """Return what a layer keeps in bf16: both norms' inputs and outputs, queries, keys, values, attention's output,
        gate, up and their product.
        """
        head = 128
        return 2 * tokens * (4 * self.hidden + head * (2 * self.heads + 2 * self.kv_heads) + 3 * self.width)


MODELS = (
    DenseModel("R1-Distill-Qwen-1.5B", 1536, 28, 12, 2, 8960, 151936, True),
    DenseModel("R1-Distill-Qwen-7B", 3584, 28, 28, 4, 18944, 152064, True),
    DenseModel("R1-Distill-Llama-8B", 4096, 32, 32, 8, 14336, 128256, False),
    DenseModel("R1-Distill-Qwen-14B", 5120, 48, 40, 8, 13824, 152064, True),
    DenseModel("R1-Distill-Qwen-32B", 5120, 64, 40, 8, 27648, 152064, True),
    DenseModel("R1-Distill-Llama-70B", 8192, 80, 64, 8, 28672, 128256, False))


def bytes_on_each(model: DenseModel, task: str, gpus: int, tokens: int, cached: int) -> float:
    """Return what is allocated on each of `gpus` GPUs for `task`; `tokens` of a micro-batch, `cached` of all users."""
    size, unit = model.parameters, 2 * 2 * model.layer_parameters
    if task == "serve":
        return 2 * size / gpus + cached * model.cache_bytes / gpus + model.layer_activations(tokens)
    states = {"finetune": 18, "lora": 2, "qlora": NF4}[task] * size / gpus
    adapters = 0 if task == "finetune" else 16 * LORA_RANK * model.layers * 2 * (4 * model.hidden + 3 * model.width)
    kept = 2 * tokens * model.hidden * model.layers
    head = tokens * model.vocabulary * 12
    return states + adapters + (unit if gpus > 1 or task == "qlora" else 0) + kept + max(
        head, 2 * model.layer_activations(tokens))


def needs(model: DenseModel, task: str, gpus: int, tokens: int, cached: int) -> float:
    """Return what a GPU may need, with context, NCCL and fragments."""
    nccl = NCCL_FIRST + NCCL_GROUP[1] if gpus > 1 else 0
    return bytes_on_each(model, task, gpus, tokens, cached) * (1 + FRAGMENTS[1]) + CONTEXT + nccl


def fewest(model: DenseModel, task: str, gpu: Gpu, tokens: int, cached: int) -> int | None:
    """Return the fewest GPUs, a power of two up to 256, on which it fits; those that serve share each layer."""
    for gpus in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if needs(model, task, gpus, tokens, cached) <= gpu.memory_bytes:
            return gpus
    return None
