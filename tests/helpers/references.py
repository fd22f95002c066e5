"""The references of all operators by name, which never dispatch: what kernels are compared with, wherever they run."""

from types import SimpleNamespace

from megatron_deepseek.ops import attention, cross_entropy, norm, permute, rope
from megatron_deepseek.ops.fp8 import e5m6, encoding, gemm, norm as fp8_norm, recipe

MODULES = (attention, cross_entropy, norm, permute, rope, e5m6, encoding, gemm, fp8_norm, recipe)
REFERENCES = {name: value.reference for module in MODULES for name, value in vars(module).items()
              if hasattr(value, "reference") and value.__module__ == module.__name__}
plain = SimpleNamespace(**REFERENCES)
