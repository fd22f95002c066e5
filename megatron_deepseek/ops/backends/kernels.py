"""The operators of csrc/, torch.ops.megatron_deepseek.*: their library, their results' shapes, their derivatives.

`load` registers them. registry.py decides which of them are used; csrc/*.cu say what each computes. Operators that only
serve a backward, or whose results are codes, have no derivative of their own.
"""

import functools
import re
from pathlib import Path

import torch

from megatron_deepseek.ops.fp8.block_scaled import map_rows
from megatron_deepseek.ops.permute import gather_rows
from megatron_deepseek.torch_private import declaration_of

NAMESPACE = "megatron_deepseek"
LIBRARY = Path(__file__).parents[1] / "libmegatron_deepseek.so"
SOURCES = Path(__file__).parents[3] / "csrc"
TILE = 128


def load(path: Path = LIBRARY) -> None:
    """Register the operators. Raise OSError if they do not fit this torch, or if the library was built of other sources
    than these and so has other operators; RuntimeError if they are loaded already.
    """
    if is_loaded():
        raise RuntimeError(f"the operators of {NAMESPACE} are loaded already, {path} would define them again")
    torch.ops.load_library(str(path))
    if other := [name for name in FAKES if not _is_as_declared(name)]:
        raise OSError(f"{path} was built of other sources: {', '.join(other)}; python csrc/build.py builds it again")
    _complete()


def _is_as_declared(name: str) -> bool:
    """Return whether there is an operator of this name, with the arguments that csrc/ declares where csrc/ is here."""
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        return False
    declared = declarations()
    return not declared or declaration_of(operator(name)) == f"{NAMESPACE}::{declared.get(name)}"


def declarations(folder: Path = SOURCES) -> dict[str, str]:
    """Return what the bindings in `folder` declare, as `name(arguments) -> results`, by name; {} without sources."""
    found = [text for path in sorted(folder.glob("*_binding.cpp"))
             for text in re.findall(r'm\.def\(((?:\s*"[^"]*")+)\)', path.read_text())]
    whole = ["".join(re.findall(r'"([^"]*)"', text)) for text in found]
    return {each.partition("(")[0]: each for each in whole}


def _complete() -> None:
    """Give the operators the shapes of their results, and their derivatives."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    for name, (backward, setup) in DERIVATIVES.items():
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup)


@functools.cache
def declare(folder: Path = SOURCES) -> torch.library.Library | None:
    """Register the operators without kernels, from what the bindings in `folder` declare: enough to know the shapes of
    their results. Return what keeps them registered; None where they are loaded already or the sources are not there.
    """
    if is_loaded() or not folder.is_dir():
        return None
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for text in declarations(folder).values():
        definitions.define(text)
    _complete()
    return definitions


def is_loaded() -> bool:
    return hasattr(torch.ops.megatron_deepseek, "route")


def operator(name: str):
    return getattr(torch.ops.megatron_deepseek, name)


def starts_aligned(x: torch.Tensor) -> bool:
    """Return whether x starts at a multiple of 16 bytes of its storage, as all storages of torch's allocators do.

    The address itself would tell more, but tensors without data (FakeTensor) have none. The bindings check it, and
    refuse views at odd places where torch.compile, which cannot trace this question, took them for aligned.
    """
    return torch.compiler.is_compiling() or x.storage_offset() * x.element_size() % 16 == 0


def rows_are_aligned(x: torch.Tensor) -> bool:
    """Return whether x has contiguous rows that start at multiples of 16 bytes."""
    unit = 16 // x.element_size()
    return x.stride(-1) == 1 and all(stride % unit == 0 for stride in x.stride()[:-1]) and starts_aligned(x)


# Shapes of results ----------------------------------------------------------------------------------------------------

def _tiles(size: int) -> int:
    return -(-size // TILE)


def _rows(like: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (like.new_empty(rows, columns, dtype=torch.float8_e4m3fn),
            like.new_empty(rows, _tiles(columns), dtype=torch.float32))


def _columns(like: torch.Tensor, columns: int, tiles: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    count = _tiles(like.shape[0]) if tiles is None else tiles.shape[0]
    return (like.new_empty(columns, count * TILE, dtype=torch.float8_e4m3fn),
            like.new_empty(columns, count, dtype=torch.float32))


def _keys_values(kv, k_rope, table, nope):
    return kv.new_empty(*kv.shape[:3], nope + k_rope.shape[-1]), kv.new_empty(*kv.shape[:3], kv.shape[-1] - nope)


def _keys_values_backward(grad_k, grad_v, table, nope):
    return (grad_k.new_empty(*grad_k.shape[:3], nope + grad_v.shape[-1]),
            grad_k.new_empty(*grad_k.shape[:2], grad_k.shape[-1] - nope))


def _statistics(logits, labels, first_id):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))


def _route(experts, num_experts, align):
    copies = experts.numel()
    slots = copies if align == 1 else -(-(copies + num_experts * (align - 1)) // align) * align
    return tuple(experts.new_empty(size, dtype=torch.int32) for size in (slots, copies, num_experts, num_experts + 1))


def _quantize_blocks(w, transpose, power_of_two):
    *stack, rows, columns = w.shape
    m, kept = _tiles(rows), columns if transpose else 0
    codes, scales = {"dtype": torch.float8_e4m3fn}, {"dtype": torch.float32}
    return (w.new_empty(w.shape, **codes), w.new_empty(*stack, m, _tiles(columns), **scales),
            w.new_empty(*stack, kept, m * TILE, **codes), w.new_empty(*stack, _tiles(kept), m, **scales))


def _norm_rows(x, weight, eps, keep, power_of_two):
    return *_rows(x, *x.shape), x.new_empty(x.shape[0], dtype=torch.float32), x[:x.shape[0] if keep else 0].clone()


def _norm_backward(grad, x, weight, rstd, tiles, power_of_two):
    return *_rows(x, *x.shape), *_columns(x, x.shape[1], tiles), torch.empty_like(weight)


def _gemm_output(a_q, *shape, fp32):
    return a_q.new_empty(shape, dtype=torch.float32 if fp32 else torch.bfloat16)


FAKES = {
    "rope_tail": lambda x, table, nope, inverse: x.new_empty(x.shape),
    "keys_values": _keys_values,
    "keys_values_backward": _keys_values_backward,
    "cross_entropy_statistics": _statistics,
    "cross_entropy_gradient_": lambda logits, labels, first_id, max, sum, grad: None,
    "route": _route,
    "gather_rows": lambda x, copy_of_slot, slot_of_copy: x.new_empty(copy_of_slot.shape[0], x.shape[1]),
    "combine_rows": lambda y, copy_of_slot, slot_of_copy, weights: y.new_empty(slot_of_copy.shape[0], y.shape[1]),
    "combine_backward": lambda grad, y, copy_of_slot, weights: (torch.empty_like(y), torch.empty_like(weights)),
    "quantize_rows": lambda x, power_of_two: _rows(x, *x.shape),
    "quantize_columns": lambda x, tiles, power_of_two: _columns(x, x.shape[1], tiles),
    "quantize_both": lambda x, tiles, power_of_two: (*_rows(x, *x.shape), *_columns(x, x.shape[1], tiles)),
    "quantize_blocks": _quantize_blocks,
    "retile_columns": lambda q, scales, tiles, power_of_two: _columns(q, q.shape[1], tiles),
    "quantize_e5m6": lambda x: (x.new_empty(x.shape[0], x.shape[1] // 2 * 3, dtype=torch.uint8),
                                x.new_empty(x.shape[0], _tiles(x.shape[1]), dtype=torch.float32)),
    "dequantize_e5m6": lambda packed, scales, fp32: _gemm_output(packed, packed.shape[0], packed.shape[1] // 3 * 2,
                                                                 fp32=fp32),
    "retile_e5m6": lambda packed, scales, tiles, power_of_two: _columns(packed, packed.shape[1] // 3 * 2, tiles),
    "swiglu_quantize_rows": lambda gate, up, power_of_two: _rows(gate, *gate.shape),
    "swiglu_quantize_columns": lambda gate, up, tiles, power_of_two: _columns(gate, gate.shape[1], tiles),
    "swiglu_backward_quantize": lambda grad, gate, up, tiles, power_of_two: (
        *_rows(gate, gate.shape[0], 2 * gate.shape[1]), *_columns(gate, 2 * gate.shape[1], tiles)),
    "kept_swiglu_quantize_columns": lambda gate_q, gate_s, up_q, up_s, tiles, power_of_two: _columns(
        gate_q, gate_q.shape[1], tiles),
    "kept_swiglu_backward_quantize": lambda grad, gate_q, gate_s, up_q, up_s, tiles, power_of_two: (
        *_rows(grad, grad.shape[0], 2 * grad.shape[1]), *_columns(grad, 2 * grad.shape[1], tiles)),
    "norm_quantize_rows": _norm_rows,
    "norm_backward_quantize": _norm_backward,
    "scaled_mm": lambda a_q, a_s, b_q, b_s, fp32, tma_store=False, clusters=False: _gemm_output(
        a_q, a_q.shape[0], b_q.shape[0], fp32=fp32),
    "grouped_scaled_mm": lambda a_q, a_s, b_q, b_s, tiles, tall, fp32, tma_store=False, clusters=False: _gemm_output(
        a_q, a_q.shape[0], b_q.shape[-2], fp32=fp32),
    "grouped_scaled_mm_wgrad": lambda a_q, a_s, b_q, b_s, groups, fp32, clusters=False: _gemm_output(
        a_q, groups.shape[0], a_q.shape[0], b_q.shape[0], fp32=fp32),
}


# Derivatives ----------------------------------------------------------------------------------------------------------

def _rope_tail_setup(ctx, inputs, output):
    _, table, ctx.nope, ctx.inverse = inputs
    ctx.save_for_backward(table)


def _rope_tail_backward(ctx, grad):
    (table,) = ctx.saved_tensors
    return operator("rope_tail")(_rows_aligned(grad), table, ctx.nope, not ctx.inverse), None, None, None


def _keys_values_setup(ctx, inputs, output):
    _, _, ctx.table, ctx.nope = inputs


def _keys_values_derivative(ctx, grad_k, grad_v):
    grad_kv, grad_k_rope = operator("keys_values_backward")(
        _rows_aligned(grad_k), _rows_aligned(grad_v), ctx.table, ctx.nope)
    return grad_kv, grad_k_rope, None, None


def _rows_aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x as the kernels take heads."""
    return x if rows_are_aligned(x) else x.contiguous()


def _gather_setup(ctx, inputs, output):
    ctx.places = inputs[1:]


def _gather_backward(ctx, grad):
    """Gather rows again that went to one place each, as tiles if the gradient comes as tiles."""
    copy_of_slot, slot_of_copy = ctx.places
    if slot_of_copy.shape[1] == 1:
        return map_rows(grad.contiguous(), lambda part: gather_rows(part, slot_of_copy.flatten())), None, None
    return operator("combine_rows")(grad.contiguous(), *ctx.places, None), None, None


def _combine_setup(ctx, inputs, output):
    y, copy_of_slot, slot_of_copy, weights = inputs
    ctx.save_for_backward(*((y, weights) if weights is not None else ()))
    ctx.places = copy_of_slot, slot_of_copy


def _combine_derivative(ctx, grad):
    grad, (copy_of_slot, slot_of_copy) = grad.contiguous(), ctx.places
    saved = ctx.saved_tensors  # once: a layer that is recomputed refuses a second reading
    if not saved:
        return operator("gather_rows")(grad, copy_of_slot, slot_of_copy), None, None, None
    y, weights = saved
    grad_y, grad_weights = operator("combine_backward")(grad, y, copy_of_slot, weights)
    return grad_y, None, None, grad_weights


DERIVATIVES = {
    "rope_tail": (_rope_tail_backward, _rope_tail_setup),
    "keys_values": (_keys_values_derivative, _keys_values_setup),
    "gather_rows": (_gather_backward, _gather_setup),
    "combine_rows": (_combine_derivative, _combine_setup),
}
