"""Kernels of softmax attention: over whole sequences, and over parts of the keys that are merged exactly.

A part comes with the log-sum-exp of its rows. Let (o_j, l_j) be output and log-sum-exp of part j of the keys. Then with
l = log sum_j exp(l_j), o = sum_j exp(l_j - l) o_j is attention over all of them. The backward of a part needs only the
merged o and l: they give its probabilities exp(s - l) and the softmax's row term sum(do * o) (FlashAttention, arXiv
2205.14135).

Keys and values may have fewer heads than queries: each is then for as many neighbouring heads of queries (grouped-query
attention, arXiv 2305.13245). The kernels take them as they are.

Shapes: B batch, N heads, S queries, K keys, D query and key width, V value width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_deepseek.device import on_accelerator
from megatron_deepseek.ops.backends.registry import with_backends
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.ops.products import is_widened

aten = torch.ops.aten


@dataclass(frozen=True)
class Scores:
    """Scores are q k^T * `scale`. All of them count or, if `causal`, those of a square's lower triangle."""

    scale: float
    causal: bool = False


def attend_within_documents(q_BNSD: torch.Tensor, k_BNSD: torch.Tensor, v_BNSV: torch.Tensor,
                            documents: Documents, scale: float) -> torch.Tensor:
    """Return causal softmax attention of each token over its own document, [B, N, S, V].

    It goes document by document, without a mask: the fused kernels see plain causal squares, nothing of size S x S is
    ever made, and no score across documents is computed.
    """
    rows = []
    for q_NSD, k_NSD, v_NSV, places in zip(q_BNSD, k_BNSD, v_BNSV, documents.rows, strict=True):
        parts = [causal_attention(*(x[None, :, place] for x in (q_NSD, k_NSD, v_NSV)), scale) for place in places]
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def causal_attention(q_BNSD: torch.Tensor, k_BNSD: torch.Tensor, v_BNSV: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the output [B, N, S, V] of torch's fused kernel, in float32 where products are (products.py)."""
    if is_widened(q_BNSD):
        return _WidenedAttention.apply(q_BNSD, k_BNSD, v_BNSV, Scores(scale, causal=True))
    return F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSV, is_causal=True, scale=scale,
                                          enable_gqa=q_BNSD.shape[1] != k_BNSD.shape[1])


class _WidenedAttention(torch.autograd.Function):
    """Attention in float32 that keeps what the kernel of bfloat16 keeps."""

    @staticmethod
    def forward(ctx, q, k, v, scores):
        out, lse = _cpu_forward(q, k, v, scores)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scores = scores
        return out

    @staticmethod
    def backward(ctx, grad):
        return *_cpu_backward(grad, *ctx.saved_tensors, ctx.scores), None


def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """Return F.scaled_dot_product_attention without gradients, in float32 where products are (products.py)."""
    if not is_widened(q):
        return F.scaled_dot_product_attention(q, k, v, **options)
    wide = {name: option.float() if isinstance(option, torch.Tensor) and option.dtype == q.dtype else option
            for name, option in options.items()}  # a mask may be of q's dtype, or of booleans
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **wide).to(q.dtype)


class Output:
    """The form in which attention's output [B, S, N * V] goes to the next layer and is kept for the backward.

    This one keeps the output itself. The FP8 recipe has another (ops/fp8/attention.py).
    """

    def give(self, y_BSV: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return what the next layer gets, and what is kept."""
        return y_BSV, (y_BSV,)

    def restore(self, kept: tuple[torch.Tensor, ...], like_BSV: torch.Tensor) -> torch.Tensor:
        """Return the output from what was kept, in the shape and dtype of `like_BSV`."""
        return kept[0]


@with_backends("attention")
def attention(q_BSND: torch.Tensor, k_BSND: torch.Tensor, v_BSNV: torch.Tensor, documents: Documents | None,
              scale: float, width: int) -> torch.Tensor:
    """Return causal softmax attention, within documents where they are given: [B, S, N * width].

    Of the values only the first `width` columns count; the rest is padding.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSND, k_BSND, v_BSNV))
    if documents is None:
        y_BNSV = causal_attention(q, k, v, scale)
    else:
        y_BNSV = attend_within_documents(q, k, v, documents, scale)
    return y_BNSV.transpose(1, 2)[..., :width].flatten(-2)


@with_backends("attend")
def attend(q_BNSD: torch.Tensor, k_BNKD: torch.Tensor, v_BNKV: torch.Tensor, scores: Scores
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B, N, S, V] and log-sum-exp [B, N, S] of attention over these keys."""
    forward, _ = kernel_for(q_BNSD)
    return forward(q_BNSD, k_BNKD, v_BNKV, scores)


@with_backends("attend_backward")
def attend_backward(grad_BNSV, q_BNSD, k_BNKD, v_BNKV, out_BNSV, lse_BNS, scores: Scores
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v; `out_BNSV` and `lse_BNS` are merged over all parts of the keys."""
    _, backward = kernel_for(q_BNSD)
    return backward(grad_BNSV, q_BNSD, k_BNKD, v_BNKV, out_BNSV, lse_BNS, scores)


def kernel_for(q: torch.Tensor):
    """Return (forward, backward), fused where there is a kernel. CUDA's flash kernel takes 16-bit dtypes only."""
    if q.device.type == "cpu" and not on_accelerator(q):
        return _cpu_forward, _cpu_backward
    if on_accelerator(q) and q.dtype in (torch.bfloat16, torch.float16):
        return cuda_forward, cuda_backward
    return plain_forward, plain_backward


def plain_forward(q, k, v, scores: Scores):
    """Return output and log-sum-exp by the definition, in at least float32; S x K scores exist while it runs."""
    k, v = _for_each_query_head(q, k, v)
    logits = _logits(q, k, scores)
    lse = logits.logsumexp(-1)
    probabilities = (logits - lse.unsqueeze(-1)).exp()
    return (probabilities @ v.to(logits.dtype)).to(q.dtype), lse


def plain_backward(grad, q, k, v, out, lse, scores: Scores):
    """Return the gradients of q, k and v by the definition; S x K scores exist while it runs."""
    heads = k.shape[1]
    k, v = _for_each_query_head(q, k, v)
    logits = _logits(q, k, scores)
    wide = logits.dtype
    probabilities = (logits - lse.unsqueeze(-1)).exp()
    grad, v, out = grad.to(wide), v.to(wide), out.to(wide)
    row_term = (grad * out).sum(-1, keepdim=True)
    grad_logits = probabilities * (grad @ v.mT - row_term) * scores.scale
    of_k, of_v = (x.unflatten(1, (heads, -1)).sum(2).to(k.dtype)
                  for x in (grad_logits.mT @ q.to(wide), probabilities.mT @ grad))
    return (grad_logits @ k.to(wide)).to(q.dtype), of_k, of_v


def _for_each_query_head(q: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return keys or values with as many heads as q, each repeated for its queries' heads."""
    return [x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in tensors]


def _logits(q, k, scores: Scores) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ k.to(wide).mT * scores.scale
    if not scores.causal:
        return logits
    later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return logits.masked_fill(later, float("-inf"))


def _pad(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return x with zeros up to `width`: the fused kernels need values as wide as keys."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _cpu_forward(q, k, v, scores: Scores):
    if is_widened(q):
        out, lse = _cpu_forward(q.float(), k.float(), v.float(), scores)
        return out.to(q.dtype), lse
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, _pad(v, q.shape[-1]), 0.0, scores.causal, scale=scores.scale)
    return out[..., :v.shape[-1]], lse


def _cpu_backward(grad, q, k, v, out, lse, scores: Scores):
    if is_widened(q):
        return tuple(each.to(q.dtype) for each in _cpu_backward(
            grad.float(), q.float(), k.float(), v.float(), out.float(), lse, scores))
    width = q.shape[-1]
    grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _pad(grad, width), q, k, _pad(v, width), _pad(out, width), lse, 0.0, scores.causal, scale=scores.scale)
    return grad_q, grad_k, grad_v[..., :v.shape[-1]]


def cuda_forward(q, k, v, scores: Scores):
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        *_as_wide(q, k, v), 0.0, scores.causal, False, scale=scores.scale)
    return out[..., :v.shape[-1]], lse


def cuda_backward(grad, q, k, v, out, lse, scores: Scores):
    """Return the gradients of q, k and v.

    The kernel makes `grad` and `out` contiguous if they are not, but reads `lse` as if it were contiguous.
    """
    no_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = aten._scaled_dot_product_flash_attention_backward(
        *_as_wide(grad, q, k, v, out), lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, scores.causal,
        no_state, no_state[:0], scale=scores.scale)
    return tuple(grad[..., :x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True))


def _as_wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return all tensors as wide as the widest, rounded up to a multiple of 8, which CUDA's flash kernel needs."""
    width = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    return [_pad(x, width) for x in tensors]


@dataclass(eq=False)
class LogSumExpMerge:
    """Attention over the parts of the keys that were added so far: output and log-sum-exp in at least float32."""

    out_BNSV: torch.Tensor
    lse_BNS: torch.Tensor

    @classmethod
    def empty(cls, q_BNSD: torch.Tensor, v_width: int) -> "LogSumExpMerge":
        """Return attention of these queries over no keys."""
        wide = torch.promote_types(q_BNSD.dtype, torch.float32)
        out = q_BNSD.new_zeros(*q_BNSD.shape[:-1], v_width, dtype=wide)
        return cls(out, out.new_full(out.shape[:-1], float("-inf")))

    def add(self, queries: tuple[slice, ...], out_BNRV: torch.Tensor, lse_BNR: torch.Tensor) -> None:
        """Merge a part that only some queries saw; `queries` is their index in [B, N, S]."""
        before = self.lse_BNS[queries]
        joint = torch.logaddexp(before, lse_BNR)
        keep, new = (torch.where(joint.isfinite(), (lse - joint).exp(), 0).unsqueeze(-1) for lse in (before, lse_BNR))
        self.out_BNSV[queries] = self.out_BNSV[queries] * keep + out_BNRV.to(self.out_BNSV.dtype) * new
        self.lse_BNS[queries] = joint
