"""csrc/'s kernels of RoPE, routing and the loss as the layers call them, with their references' arguments.

An operator returns NotImplemented for what its kernel does not take (other dtypes, widths that are no multiple of 16
bytes): the registry calls the reference then.
"""

import torch

from megatron_deepseek.ops.backends.cuda.operands import aligned, dense
from megatron_deepseek.ops.backends.kernels import operator
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled, map_rows, plain, take_rows
from megatron_deepseek.ops.permute import gather_rows as gather_again, sum_rows

_BF16 = torch.bfloat16


# RoPE (rope.py) -------------------------------------------------------------------------------------------------------

def rope_queries(x: torch.Tensor, table_2SD: torch.Tensor, nope: int):
    if x.dtype != _BF16 or nope % 8 or x.shape[-1] % 8:
        return NotImplemented
    return operator("rope_tail")(aligned(x), table_2SD.float().contiguous(), nope, False)


def assemble_keys(kv: torch.Tensor, k_rope: torch.Tensor, table_2SD: torch.Tensor | None, nope: int):
    if kv.dtype != _BF16 or nope % 8 or kv.shape[-1] % 8 or k_rope.shape[-1] % 8:
        return NotImplemented
    table = None if table_2SD is None else table_2SD.float().contiguous()
    return operator("keys_values")(dense(kv), dense(k_rope), table, nope)


# Routing (permute.py) -------------------------------------------------------------------------------------------------

def sort_by_expert(experts_TK: torch.Tensor, num_experts: int):
    if experts_TK.dtype != torch.int64 or num_experts > 1024 or not experts_TK.numel():
        return NotImplemented
    order_R, inverse_R, counts_E, _ = operator("route")(experts_TK.contiguous(), num_experts, 1)
    return order_R, inverse_R, counts_E.long()


def _rows_fit(x: torch.Tensor) -> bool:
    return x.ndim == 2 and x.shape[1] * x.element_size() % 16 == 0


class _GatherTiles(torch.autograd.Function):
    """Rows of tiles: codes and scales are moved as bytes. Their gradient is an ordinary tensor or tiles."""

    @staticmethod
    def forward(ctx, x_TH, order_R, inverse_R, copies):
        ctx.save_for_backward(inverse_R)
        ctx.copies = copies
        return take_rows(x_TH, order_R if copies == 1 else order_R // copies)

    @staticmethod
    def backward(ctx, grad_RH):
        (inverse_R,) = ctx.saved_tensors
        if ctx.copies == 1:
            return map_rows(grad_RH.contiguous(), lambda part: gather_again(part, inverse_R)), None, None, None
        grad_RH, place_TK = plain(grad_RH), inverse_R.view(-1, ctx.copies)
        if not _rows_fit(grad_RH) or grad_RH.dtype != _BF16:
            return sum_rows(grad_RH, place_TK), None, None, None
        unread = place_TK.new_empty(0, dtype=torch.int32)  # only the derivative would read it
        return operator("combine_rows")(dense(grad_RH), unread, place_TK.int(), None), None, None, None


def _gather(x: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, copies: int):
    if isinstance(x, BlockScaled):
        return _GatherTiles.apply(x, order_R, inverse_R, copies)
    if not _rows_fit(x) or x.requires_grad and x.dtype != _BF16:
        return NotImplemented
    return operator("gather_rows")(dense(x), order_R.int(), inverse_R.int().view(-1, copies))


def gather_rows(x_RW: torch.Tensor, index_Q: torch.Tensor):
    if not _rows_fit(x_RW) or not x_RW.is_contiguous():
        return NotImplemented
    unread = index_Q.new_empty(len(x_RW), 1, dtype=torch.int32)  # only the derivative would read it
    return operator("gather_rows")(x_RW, index_Q.int(), unread)


def permute(x_RH: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor):
    return _gather(x_RH, order_R, inverse_R, 1)


def copy_and_permute(x_TH: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor):
    return _gather(x_TH, order_R, inverse_R, order_R.shape[0] // x_TH.shape[0]) if len(x_TH) else NotImplemented


def weighted_sum(y_RH: torch.Tensor, weights_TK: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor):
    if isinstance(y_RH, BlockScaled) or not _rows_fit(y_RH) or y_RH.dtype != _BF16:
        return NotImplemented
    slots_TK = inverse_R.int().view(weights_TK.shape)
    return operator("combine_rows")(dense(y_RH), order_R.int(), slots_TK, weights_TK.float().contiguous())


# Cross-entropy (cross_entropy.py) -------------------------------------------------------------------------------------

def cross_entropy_statistics(logits_Tv: torch.Tensor, labels_T: torch.Tensor, first_id: int):
    if logits_Tv.dtype != _BF16:
        return NotImplemented
    return operator("cross_entropy_statistics")(dense(logits_Tv), labels_T.contiguous(), first_id)


def cross_entropy_gradient(logits_Tv, labels_T, first_id, max_T, sum_T, grad_T):
    """Overwrite contiguous logits with their gradient and return them."""
    if logits_Tv.dtype != _BF16:
        return NotImplemented
    logits_Tv = dense(logits_Tv)
    operator("cross_entropy_gradient_")(logits_Tv, labels_T.contiguous(), first_id, max_T, sum_T,
                                        grad_T.float().contiguous())
    torch.autograd.graph.increment_version(logits_Tv)  # makes a second backward an error, not a wrong result
    return logits_Tv
