"""Tensors without numbers, on which the real code of a training runs.

They are tensors of the CPU: torch without CUDA cannot compute gradients of fake tensors on a GPU. They may stand for a
GPU's all the same. Then this project's code takes its branches for GPUs (device.on_accelerator), and those functions of
torch that choose by device are replaced by what they choose on a GPU (`_as_on_gpu`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.distributed import Work

from megatron_deepseek.dry_run.host_shards import shards_on_host
from megatron_deepseek.dry_run.known_results import KnownResults
from megatron_deepseek.dry_run.plain_experts import one_expert_for_all
from megatron_deepseek.ops.backends.kernels import FAKES, NAMESPACE
from megatron_deepseek.torch_private import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_aten = torch.ops.aten
_CPU = torch.device("cpu")
# Results whose shape depends on numbers, or that share memory with what is not an argument.
_BY_TORCH = frozenset({_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten.nonzero.default,
                       _aten.lift_fresh.default, _aten.masked_select.default, _aten.repeat_interleave.Tensor})
_SEND = torch.ops.c10d.send.default
_OF_NUMBERS = _aten.lift_fresh.default  # torch.tensor([1, 2]): on a device it takes memory as any other


class _Keeps(Work):
    """The work of a collective that is done at once. As a back end's it keeps its tensors while somebody has it."""

    def __init__(self, running: set["_Keeps"], tensors):
        super().__init__()
        self._running, self._tensors = running, tensors

    def wait(self, timeout=None) -> bool:
        self._running.discard(self)
        return True


class NothingComputed(FakeTensorMode):
    """A mode in which tensors are made without memory, and operators give shapes without numbers.

    Where the host reads a number of such a tensor it gets 1. Operators on ordinary tensors alone, such as the ranks of
    a mesh, are computed as ever. `stands_for_accelerator`: the tensors stand for a GPU's.
    """

    def __init__(self, stands_for_accelerator: bool = False):
        super().__init__(allow_non_fake_inputs=True)
        self.stands_for_accelerator = stands_for_accelerator
        self._works: set[_Keeps] = set()
        self._known = KnownResults()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is _aten._local_scalar_dense.default and types:
            return 1.0 if args[0].is_floating_point() else 1
        if operator is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as in a job; torch's function for fake tensors makes a new one
        if not types and operator is not _OF_NUMBERS and _on_host((args, kwargs or {})):
            return operator(*args, **(kwargs or {}))
        if operator.namespace == "profiler":
            return operator(*args, **(kwargs or {}))  # it marks a time, and has no tensors
        if types and self._are_plain(operator, args, kwargs or {}):
            try:
                return self._shapes(operator, args, kwargs or {})
            except NotImplementedError:
                pass  # an operator without a kernel for shapes alone: torch knows how to take it apart
        result = super().__torch_dispatch__(operator, types, args, kwargs)
        return self._keeping(operator, result, args) if operator.namespace == "c10d" else result

    def _are_plain(self, operator, args, kwargs) -> bool:
        """Return whether an operator has fake tensors alone, and gives such on their device; the fakes of our own
        operators take any, such as tables of RoPE with numbers.
        """
        if operator.namespace == NAMESPACE:
            return True
        if operator.namespace != "aten" or operator in _BY_TORCH or kwargs.get("device") is not None:
            return False
        given = (*args, *kwargs.values())
        return all(isinstance(each, FakeTensor) and not each.is_meta for each in _tensors(given))

    def _shapes(self, operator, args, kwargs):
        """Return what torch's FakeTensorMode returns, by the kernel for the meta device alone: FakeTensorMode's own
        questions and its cache take several times as long, and a step of V3 has a hundred thousand operators.
        """
        function = FAKES[operator.overloadpacket.__name__] if operator.namespace == NAMESPACE else operator

        def compute():
            with in_kernel_invocation_manager(self):
                return function(*args, **kwargs)

        return self._wrapped(self._known.of(operator, args, kwargs, compute))

    def _wrapped(self, result):
        if isinstance(result, FakeTensor):
            return result  # an argument that was changed in place
        if isinstance(result, torch.Tensor):
            return FakeTensor(self, result, _CPU)
        return type(result)(map(self._wrapped, result)) if isinstance(result, tuple | list) else result

    def _keeping(self, operator, result, args):
        """Return a collective's result with a Work that keeps what it works on until somebody has waited, but for what
        a GPU sends to one other rank: NCCL lets go of it by itself.
        """
        work = _Keeps(self._works, None if self.stands_for_accelerator and operator is _SEND else args)
        self._works.add(work)
        return (*result[:-1], work.boxed()) if isinstance(result, tuple) else work.boxed()


def _tensors(arguments) -> Iterator[torch.Tensor]:
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, tuple | list):
            yield from _tensors(each)


def _on_host(arguments: tuple) -> bool:
    """Return whether an operator's arguments have tensors, and they have numbers."""
    args, kwargs = arguments
    tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    return bool(tensors) and not any(each.is_meta for each in tensors)


@contextmanager
def nothing_computed(gpu: bool) -> Iterator[NothingComputed]:
    """Make tensors without numbers for a `with` block; `gpu`: they stand for a GPU's."""
    with _as_on_gpu() if gpu else nullcontext(), NothingComputed(gpu) as mode:
        yield mode


@contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Replace torch's functions that are made of others on a CPU, or choose among kernels, by what a GPU runs. A mode
    for functions would not see those that a backward calls to make a forward again.
    """
    before = F.rms_norm, F.scaled_dot_product_attention
    F.rms_norm, F.scaled_dot_product_attention = _fused_norm, _fused_attention
    try:
        with shards_on_host(), one_expert_for_all():
            yield
    finally:
        F.rms_norm, F.scaled_dot_product_attention = before


class _FusedNorm(torch.autograd.Function):
    """An RMSNorm as CUDA's kernel has it, which keeps its input and one number of each row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _fused_norm(x, shape, weight, eps):
    return _FusedNorm.apply(x, weight)


def _fused_attention(q, k, v, is_causal=False, scale=None, enable_gqa=False):
    """Return attention by the flash kernel or, where values are narrower than keys, the memory-efficient one: both keep
    the output and a log-sum-exp of each row.
    """
    if q.shape[-1] == v.shape[-1]:
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
    return _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)[0]
