"""The output head by chunks of tokens: no more than chunk x v logits exist at a time.

Logits are computed again in the backward, one GEMM more than the three of a linear layer. What is saved is the head's
input, and two numbers for each token.

The weight's gradient [v, H] is by far the largest tensor, and a sum over chunks kept in bfloat16 would be rounded at
each of them. So the backward of `log_probabilities` goes through the vocabulary instead, in blocks of rows that have as
many logits for all tokens as a chunk has for all rows. A block of the gradient is then one GEMM over all tokens,
rounded once, as without chunks, and no running sum is kept. That is possible because its gradient needs nothing of the
other logits but the statistics that the forward has found. `map_chunks`, whose function may need all logits of a token
at once, sums over chunks in float32.

Shapes: T tokens, H hidden, v this rank's part of the vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from megatron_deepseek.ops.cross_entropy import CrossEntropy
from megatron_deepseek.ops.products import linear, multiply
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary import joint_statistics
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits

Defer = Callable[[torch.Tensor, Callable[[], torch.Tensor]], None]
_ROWS = 128  # larger blocks of rows are multiples of it, as tiles of GEMMs are
_SUMMED_ROWS = 8192  # rows of a chunk's weight gradient that are computed before they are added to the sum


def slices(total: int, size: int) -> Iterator[slice]:
    """Yield slices of `size` that cover `total` things; the last may be smaller."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def rows_of_a_block(tokens: int, rows: int, chunk_size: int) -> int:
    """Return how many of the weight's rows a block has, at least one.

    All tokens then have no more logits in a block than `chunk_size` tokens have of all rows.
    """
    most = max(1, rows * chunk_size // tokens)
    return most // _ROWS * _ROWS or most


def log_probabilities(x_TH: torch.Tensor, weight_vH: torch.Tensor, labels_T: torch.Tensor, chunk_size: int,
                      tp: TensorParallel, defer: Defer | None = None, functions: CrossEntropy = CrossEntropy()
                      ) -> torch.Tensor:
    """Return log p(label) of each token [T], in at least float32, of logits x W^T.

    `defer` takes the weight's gradient, to be computed later; with None the backward computes it.
    """
    wants_x = torch.is_grad_enabled() and x_TH.requires_grad
    return _LogProbabilities.apply(x_TH, weight_vH, labels_T, chunk_size, tp, defer, wants_x, functions)


class _LogProbabilities(torch.autograd.Function):
    """The log-probabilities of labels. Their derivative by the input is W^T (one-hot label - p), known with the logits.

    So the forward computes that too, if it is wanted, and the backward scales it: the input's gradient waits for no
    GEMM, and without a gradient of the weight no logits are computed again. The node holds the weight and does not save
    it, as in zero_bubble.py.
    """

    @staticmethod
    def forward(ctx, x_TH, weight_vH, labels_T, chunk_size, tp, defer, wants_x, functions):
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        statistics_3T = torch.empty(3, len(x_TH), dtype=wide, device=x_TH.device)
        slope_TH = torch.empty_like(x_TH) if wants_x else None
        for part in slices(len(x_TH), chunk_size):
            statistics_3T[:, part] = _statistics(x_TH[part], weight_vH, labels_T[part], tp, functions,
                                                 None if slope_TH is None else slope_TH[part])
        max_T, sum_T, label_T = statistics_3T
        ctx.save_for_backward(x_TH, labels_T, max_T, sum_T, slope_TH)
        ctx.weight, ctx.chunk_size, ctx.first_id, ctx.defer = weight_vH, chunk_size, tp.rank * len(weight_vH), defer
        ctx.functions = functions
        return label_T - max_T - sum_T.log()

    @staticmethod
    def backward(ctx, grad_T):
        x_TH, labels_T, max_T, sum_T, slope_TH = ctx.saved_tensors
        grad_x = grad_weight = None
        if slope_TH is not None:
            grad_x = torch.mul(slope_TH, grad_T.unsqueeze(-1), out=torch.empty_like(slope_TH))
        if ctx.needs_input_grad[1]:
            make = partial(_weight_gradient, x_TH.detach(), ctx.weight, labels_T, ctx.first_id, max_T, sum_T, -grad_T,
                           ctx.chunk_size, ctx.functions)
            grad_weight = make() if ctx.defer is None else ctx.defer(ctx.weight, make)
        return grad_x, grad_weight, None, None, None, None, None, None


def _statistics(x_TH, weight_vH, labels_T, tp, functions: CrossEntropy, slope_TH: torch.Tensor | None) -> torch.Tensor:
    """Return joint_statistics [3, T] of one chunk; fill `slope_TH` with the derivatives of log p by the input."""
    logits_Tv = linear(x_TH, weight_vH)
    max_T, sum_T, label_T = joint_statistics(logits_Tv, labels_T, tp, functions)
    if slope_TH is not None:
        first_id, minus_T = tp.rank * len(weight_vH), torch.full_like(max_T, -1)
        multiply(functions.gradient(logits_Tv, labels_T, first_id, max_T, sum_T, minus_T), weight_vH, out=slope_TH)
    return torch.stack([max_T, sum_T, label_T])


def _weight_gradient(x_TH, weight_vH, labels_T, first_id, max_T, sum_T, grad_T, chunk_size,
                     functions: CrossEntropy) -> torch.Tensor:
    """Return the cross-entropy's gradient of the weight, [v, H], block by block of rows."""
    gradient_vH = torch.empty_like(weight_vH)

    def fill(rows: slice) -> None:
        grad_logits = functions.gradient(linear(x_TH, weight_vH[rows]), labels_T, first_id + rows.start, max_T,
                                         sum_T, grad_T)
        multiply(grad_logits.t(), x_TH, out=gradient_vH[rows])

    for rows in slices(len(weight_vH), rows_of_a_block(len(x_TH), len(weight_vH), chunk_size)):
        fill(rows)
    return gradient_vH


def map_chunks(x_TH: torch.Tensor, weight_vH: torch.Tensor, chunk_size: int, tp: TensorParallel, function: Callable,
               per_token: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Return function(VocabularyLogits, *per_token) of logits x W^T: a tensor [T, ...] or a tuple of them."""
    return _MapChunks.apply(x_TH, weight_vH, chunk_size, tp, function, per_token)


class _MapChunks(torch.autograd.Function):
    """A function of logits by chunks. The backward runs it again on each chunk's logits, its collectives included.

    The weight's gradient is not deferred: each chunk's part of it needs the gradient of the chunk's logits, which
    exists only while the input's gradient is computed.
    """

    @staticmethod
    def forward(ctx, x_TH, weight_vH, chunk_size, tp, function, per_token):
        parts = [function(VocabularyLogits(linear(x_TH[part], weight_vH), tp), *(each[part] for each in per_token))
                 for part in slices(len(x_TH), chunk_size)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TH, *per_token)
        ctx.weight, ctx.chunk_size, ctx.tp, ctx.function = weight_vH, chunk_size, tp, function
        results = tuple(map(torch.cat, zip(*map(_several, parts), strict=True)))
        ctx.mark_non_differentiable(*(each for each in results if not each.is_floating_point()))
        return results[0] if isinstance(parts[0], torch.Tensor) else results

    @staticmethod
    def backward(ctx, *grads):
        (x_TH, *per_token), weight_vH = ctx.saved_tensors, ctx.weight
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x_TH) if wants_x else None
        wide = torch.promote_types(weight_vH.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight_vH, dtype=wide) if wants_weight else None
        for part in slices(len(x_TH), ctx.chunk_size):
            grad_logits = _grad_logits(linear(x_TH[part], weight_vH), ctx.tp, ctx.function,
                                       [each[part] for each in per_token],
                                       [None if grad is None else grad[part] for grad in grads])
            if wants_x:
                multiply(grad_logits, weight_vH, out=grad_x[part])
            if wants_weight:
                _add_product(grad_weight, grad_logits, x_TH[part])
            del grad_logits  # frees them before the next chunk's are computed
        return grad_x, None if grad_weight is None else grad_weight.to(weight_vH.dtype), None, None, None, None


def _several(given: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (given,) if isinstance(given, torch.Tensor) else given


def _grad_logits(logits_Tv: torch.Tensor, tp: TensorParallel, function: Callable, per_token: list[torch.Tensor],
                 grads: list[torch.Tensor | None]) -> torch.Tensor:
    """Return the gradient of one chunk's logits from the gradients of what `function` makes of them."""
    logits_Tv.requires_grad_()
    with torch.enable_grad():
        results = _several(function(VocabularyLogits(logits_Tv, tp), *per_token))
    used = [(result, grad) for result, grad in zip(results, grads, strict=True)
            if grad is not None and result.requires_grad]
    if not used:
        return torch.zeros_like(logits_Tv)
    (gradient,) = torch.autograd.grad([result for result, _ in used], logits_Tv, [grad for _, grad in used])
    return gradient


def _add_product(sum_vH: torch.Tensor, grad_logits_Tv: torch.Tensor, x_TH: torch.Tensor) -> None:
    """Add a chunk's part of the weight's gradient in the sum's own dtype."""
    if sum_vH.dtype == x_TH.dtype:
        sum_vH.addmm_(grad_logits_Tv.t(), x_TH)
        return
    for rows in slices(len(sum_vH), _SUMMED_ROWS):
        sum_vH[rows] += multiply(grad_logits_Tv[:, rows].t(), x_TH)
