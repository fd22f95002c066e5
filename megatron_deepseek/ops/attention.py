"""Softmax attention over a part of the keys, with what is needed to join parts exactly: the rows' log-sum-exp.

Over parts j of the keys, with (o_j, l_j) the output and log-sum-exp of each, l = log sum_j exp(l_j) and
o = sum_j exp(l_j - l) o_j is attention over all of them. Backwards, a part needs the joint o and l alone: they give its
probabilities exp(s - l) and the softmax's row term sum(do * o) (FlashAttention, arXiv 2205.14135).

Shapes: B batch, N heads, S queries, K keys, D query and key width, V value width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Scores:
    """Which scores count: q k^T * scale, all of them, those of a lower triangle, or those that `mask_BSK` allows."""

    scale: float
    causal: bool = False
    mask_BSK: torch.Tensor | None = None

    @property
    def mask_B1SK(self) -> torch.Tensor | None:
        return None if self.mask_BSK is None else self.mask_BSK.unsqueeze(1)


def same_document(queries_BS: torch.Tensor, keys_BK: torch.Tensor) -> torch.Tensor:
    """Which query and key are of one document, bool [B, S, K]."""
    return queries_BS.unsqueeze(2) == keys_BK.unsqueeze(1)


def attention(q_BSND: torch.Tensor, k_BSND: torch.Tensor, v_BSNV: torch.Tensor, scores: Scores, width: int
              ) -> torch.Tensor:
    """[B, S, N * width]: of V the first `width` columns, the others are zero. Scores are causal or have a mask."""
    out_BNSV = F.scaled_dot_product_attention(
        q_BSND.transpose(1, 2), k_BSND.transpose(1, 2), v_BSNV.transpose(1, 2), attn_mask=scores.mask_B1SK,
        is_causal=scores.causal, scale=scores.scale)
    return out_BNSV.transpose(1, 2)[..., :width].flatten(-2)


def attend(q_BNSD: torch.Tensor, k_BNKD: torch.Tensor, v_BNKV: torch.Tensor, scores: Scores
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, N, S, V] and log-sum-exp [B, N, S], -inf (and output zero) for a query that may see no key."""
    forward, _ = _kernel(q_BNSD, scores)
    return forward(q_BNSD, k_BNKD, v_BNKV, scores)


def attend_backward(grad_BNSV, q_BNSD, k_BNKD, v_BNKV, out_BNSV, lse_BNS, scores: Scores
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; `out_BNSV` and `lse_BNS` are the joint ones over all parts of the keys."""
    _, backward = _kernel(q_BNSD, scores)
    return backward(grad_BNSV, q_BNSD, k_BNKD, v_BNKV, out_BNSV, lse_BNS, scores)


def _kernel(q: torch.Tensor, scores: Scores):
    """(forward, backward): fused where there is a kernel. CUDA's flash kernel takes no mask and no wide dtypes."""
    if q.device.type == "cpu":
        return _cpu_forward, _cpu_backward
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and scores.mask_BSK is None:
        return _cuda_forward, _cuda_backward
    return plain_forward, plain_backward


def plain_forward(q, k, v, scores: Scores):
    """The definition, in at least float32; keeps S x K scores while it runs."""
    logits = _logits(q, k, scores)
    lse = logits.logsumexp(-1)
    probabilities = (logits - lse.unsqueeze(-1)).exp().where(lse.isfinite().unsqueeze(-1), 0)
    return (probabilities @ v.to(logits.dtype)).to(q.dtype), lse


def plain_backward(grad, q, k, v, out, lse, scores: Scores):
    logits = _logits(q, k, scores)
    wide = logits.dtype
    probabilities = (logits - lse.unsqueeze(-1)).exp()
    grad, v, out = grad.to(wide), v.to(wide), out.to(wide)
    row_term = (grad * out).sum(-1, keepdim=True)
    grad_logits = probabilities * (grad @ v.mT - row_term) * scores.scale
    return ((grad_logits @ k.to(wide)).to(q.dtype), (grad_logits.mT @ q.to(wide)).to(k.dtype),
            (probabilities.mT @ grad).to(k.dtype))


def _logits(q, k, scores: Scores) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ k.to(wide).mT * scores.scale
    allowed = scores.mask_B1SK
    if scores.causal:
        allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))


def _pad(v: torch.Tensor, width: int) -> torch.Tensor:
    """The fused kernels want values as wide as keys."""
    return F.pad(v, (0, width - v.shape[-1]))


def _additive(scores: Scores, dtype: torch.dtype) -> torch.Tensor | None:
    mask = scores.mask_B1SK
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _cpu_forward(q, k, v, scores: Scores):
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, _pad(v, q.shape[-1]), 0.0, scores.causal, attn_mask=_additive(scores, q.dtype), scale=scores.scale)
    if scores.mask_BSK is not None:  # the kernel gives a query without keys the log-sum-exp 0
        lse = lse.masked_fill(~scores.mask_B1SK.any(-1), float("-inf"))
    return out[..., :v.shape[-1]], lse


def _cpu_backward(grad, q, k, v, out, lse, scores: Scores):
    width = q.shape[-1]
    grad_q, grad_k, grad_v = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _pad(grad, width), q, k, _pad(v, width), _pad(out, width), lse, 0.0, scores.causal,
        attn_mask=_additive(scores, q.dtype), scale=scores.scale)
    return grad_q, grad_k, grad_v[..., :v.shape[-1]]


def _cuda_forward(q, k, v, scores: Scores):
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, _pad(v, q.shape[-1]), 0.0, scores.causal, False,
                                                             scale=scores.scale)
    return out[..., :v.shape[-1]], lse


def _cuda_backward(grad, q, k, v, out, lse, scores: Scores):
    width, no_state = q.shape[-1], torch.zeros(2, dtype=torch.uint64, device=q.device)
    grad_q, grad_k, grad_v = _aten._scaled_dot_product_flash_attention_backward(
        _pad(grad, width), q, k, _pad(v, width), _pad(out, width), lse, None, None, q.shape[2], k.shape[2], 0.0,
        scores.causal, no_state, no_state[:0], scale=scores.scale)
    return grad_q, grad_k, grad_v[..., :v.shape[-1]]


@dataclass(eq=False)
class Joined:
    """Attention over the parts seen so far, of some rows of the queries each; sums in at least float32."""

    out_BNSV: torch.Tensor
    lse_BNS: torch.Tensor

    @classmethod
    def empty(cls, q_BNSD: torch.Tensor, v_width: int) -> "Joined":
        wide = torch.promote_types(q_BNSD.dtype, torch.float32)
        out = q_BNSD.new_zeros(*q_BNSD.shape[:-1], v_width, dtype=wide)
        return cls(out, out.new_full(out.shape[:-1], float("-inf")))

    def add(self, rows: slice, out_BNRV: torch.Tensor, lse_BNR: torch.Tensor) -> None:
        """Join a part that the queries `rows` saw."""
        before = self.lse_BNS[:, :, rows]
        joint = torch.logaddexp(before, lse_BNR)
        keep, new = (torch.where(joint.isfinite(), (lse - joint).exp(), 0).unsqueeze(-1) for lse in (before, lse_BNR))
        self.out_BNSV[:, :, rows] = self.out_BNSV[:, :, rows] * keep + out_BNRV.to(self.out_BNSV.dtype) * new
        self.lse_BNS[:, :, rows] = joint
