"""The kernels of csrc/ beside what torch has for the same work, eager and compiled, at DeepSeek-V3's sizes.

Bytes are the fewest that the work must move: every input read once, every output written once.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_pieces.timing import Bench, Case, Ceilings, Row

from megatron_deepseek.ops import attention, norm, permute, rope
from megatron_deepseek.ops.backends import alternatives
from megatron_deepseek.ops.backends.cuda import gemm, layers
from megatron_deepseek.ops.backends.cuda.operands import tile_rows
from megatron_deepseek.ops.backends.kernels import operator
from megatron_deepseek.ops.cross_entropy import cross_entropy_gradient, cross_entropy_statistics
from megatron_deepseek.ops.fp8 import e5m6, encoding, gemm as fp8_gemm, norm as fp8_norm
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled
from megatron_deepseek.ops.fp8.recipe import quantize_swiglu, swiglu_backward_tiles
from megatron_deepseek.ops.grouped_gemm import grouped_forward, grouped_wgrad
from megatron_deepseek.ops.swiglu import swiglu_backward

TILE = 128


def _random(bench: Bench, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=bench.device).bfloat16()


def beside_torch(ours: Callable, reference: Callable) -> dict[str, Callable]:
    """Return this project's kernel, the reference in torch, and torch.compile's form of the reference, by name."""
    return {"torch": reference, "csrc": ours, "torch.compile": torch.compile(reference, dynamic=False)}


def ceilings(bench: Bench) -> tuple[Ceilings, list[Row]]:
    """Measure a copy of many times the cache, and a GEMM of random operands, as on zeros it would run faster."""
    numbers, size = (2**20, 256) if bench.small else (2**31, 8192)
    source, a, b = torch.empty(numbers, dtype=torch.int16, device=bench.device).random_(), *(
        _random(bench, size, size) for _ in range(2))
    target = torch.empty_like(source)
    copy, product = Case("copy", {}, bytes=4 * numbers), Case("bf16 product", {}, flops=2 * size**3)
    seconds = [bench.seconds(lambda: target.copy_(source), 20), bench.seconds(lambda: a @ b, 20)]
    rows = [bench.row(case, "torch", time) for case, time in zip((copy, product), seconds)]
    return Ceilings(copy.bytes / seconds[0], product.flops / seconds[1]), rows


def quantize(bench: Bench) -> Iterator[Row]:
    m, k, half = (256, 256, 128) if bench.small else (4096, 7168, 2048)
    x, w, gate_up, weight = (_random(bench, *shape) for shape in ((m, k), (k, k), (m, 2 * half), (k,)))
    gate, up = gate_up.chunk(2, -1)
    grad, grad_half, wide = _random(bench, m, k), _random(bench, m, half), weight.float()
    rstd = (x.float().square().mean(-1) + 1e-6).rsqrt()
    codes, scales = encoding.quantize_1x128.reference(x, True)
    packed, (gate_q, gate_s), (up_q, up_s) = e5m6.quantize_e5m6.reference(x), *(
        encoding.quantize_1x128.reference(half_of_both) for half_of_both in (gate, up))
    chosen = torch.randint(m, (8 * m,), device=bench.device)
    one, both = 3 * m * k, 4 * m * k  # read as bfloat16, write codes once or twice
    cases = [
        Case("1x128", beside_torch(lambda: operator("quantize_rows")(x, True),
                                   lambda: encoding.quantize_1x128.reference(x, True)), one),
        Case("128x1, transposed", beside_torch(lambda: operator("quantize_columns")(x, None, True),
                                               lambda: encoding.quantize_128x1.reference(x, True)), one),
        Case("1x128 and 128x1", {"torch": lambda: (*encoding.quantize_1x128.reference(x),
                                                                *encoding.quantize_128x1.reference(x)),
                                 "csrc": lambda: operator("quantize_both")(x, None, False)}, both),
        Case("128x128", beside_torch(lambda: operator("quantize_blocks")(w, False, False),
                                     lambda: encoding.quantize_128x128.reference(w)), 3 * k * k),
        Case("128x128 and transpose", {"csrc": lambda: operator("quantize_blocks")(w, True, False)}, 4 * k * k),
        Case("1x128 to 128x1", {"torch": lambda: encoding.retile_128x1.reference(codes, scales, True),
                                "csrc": lambda: operator("retile_columns")(codes, scales, None, True)}, 2 * m * k),
        Case("E5M6", beside_torch(lambda: operator("quantize_e5m6")(x),
                                  lambda: e5m6.quantize_e5m6.reference(x)), 3.5 * m * k),
        Case("E5M6 to bfloat16", beside_torch(
            lambda: operator("dequantize_e5m6")(*packed, False),
            lambda: e5m6.dequantize_e5m6.reference(*packed, k, torch.bfloat16)), 3.5 * m * k),
        Case("E5M6 to 128x1", {"torch": lambda: e5m6.retile_e5m6.reference(*packed, k, True),
                               "csrc": lambda: operator("retile_e5m6")(*packed, None, True)}, 2.5 * m * k),
        Case("RMSNorm, 1x128", {"torch": lambda: encoding.quantize_1x128.reference(
                 norm.rms_norm.reference(x, weight, 1e-6)),
                                "csrc": lambda: operator("norm_quantize_rows")(x, wide, 1e-6, False, False)}, one),
        Case("RMSNorm backward, 1x128 and 128x1", {
            "torch": lambda: fp8_norm.norm_backward_quantize.reference(grad, x, weight, rstd.unsqueeze(-1)),
            "csrc": lambda: operator("norm_backward_quantize")(grad, x, wide, rstd, None, False)}, 6 * m * k),
        Case("rows of codes, to 8 experts", {
            "torch": lambda: codes.view(torch.uint8).index_select(0, chosen),
            "csrc": lambda: layers.gather_rows(codes.view(torch.uint8), chosen)}, 9 * m * k),
        Case("SwiGLU, 1x128", {"torch": lambda: quantize_swiglu.reference(gate, up, True),
                               "csrc": lambda: operator("swiglu_quantize_rows")(gate, up, True)}, 5 * m * half),
        Case("SwiGLU backward, 1x128 and 128x1", {
            "torch": lambda: [f(torch.cat(swiglu_backward(grad_half, gate, up), -1)) for f in (
                encoding.quantize_1x128.reference, encoding.quantize_128x1.reference)][0],
            "csrc": lambda: operator("swiglu_backward_quantize")(grad_half, gate, up, None, False)}, 10 * m * half),
        Case("SwiGLU backward of kept tiles", {
            "torch": lambda: swiglu_backward_tiles.reference(
                grad_half, BlockScaled(gate_q, gate_s, x.dtype), BlockScaled(up_q, up_s, x.dtype), True)[0][0],
            "csrc": lambda: operator("kept_swiglu_backward_quantize")(
                grad_half, gate_q, gate_s, up_q, up_s, None, False)}, 8 * m * half)]
    for case in cases:
        yield from bench.rows(case)


def routing(bench: Bench) -> Iterator[Row]:
    tokens, top_k, experts, width = (64, 4, 16, 256) if bench.small else (4096, 8, 256, 7168)
    chosen = torch.rand(tokens, experts, device=bench.device).topk(top_k, -1).indices
    weights, x = torch.rand(tokens, top_k, device=bench.device), _random(bench, tokens, width)
    rows, grad = _random(bench, tokens * top_k, width), _random(bench, tokens, width)
    order, inverse, _ = permute.sort_by_expert.reference(chosen, experts)
    places = order.int(), inverse.int().view(tokens, top_k)
    token, copies = 2 * tokens * width, 2 * tokens * top_k * width
    cases = [
        Case("map and sort", {"torch": lambda: permute.sort_by_expert.reference(chosen, experts),
                              "csrc": lambda: operator("route")(chosen, experts, 1)}, 16 * chosen.numel()),
        Case("map and sort, padded to 128", {"csrc": lambda: operator("route")(chosen, experts, TILE)},
             16 * chosen.numel()),
        Case("permute", beside_torch(lambda: operator("gather_rows")(x, *places),
                                     lambda: x.index_select(0, order // top_k)), token + copies),
        Case("permute backward", beside_torch(
            lambda: operator("combine_rows")(rows, *places, None),
            lambda: rows.index_select(0, inverse).view(tokens, top_k, width).sum(1)), token + copies),
        Case("unpermute", beside_torch(
            lambda: operator("combine_rows")(rows, *places, weights),
            lambda: permute.weighted_sum.reference(rows, weights, order, inverse)), token + copies),
        Case("unpermute backward", {"csrc": lambda: operator("combine_backward")(grad, rows, places[0], weights)},
             token + 2 * copies)]
    for case in cases:
        yield from bench.rows(case)


def rotary(bench: Bench) -> Iterator[Row]:
    length, heads = (16, 4) if bench.small else (4096, 128)
    q, kv, k_pe = (_random(bench, 1, length, *shape) for shape in ((heads, 192), (heads, 256), (64,)))
    table = torch.randn(2, length, 32, device=bench.device)
    grad_k, grad_v = _random(bench, 1, length, heads, 192), _random(bench, 1, length, heads, 128)
    head = 2 * length * heads
    cases = [
        Case("queries", beside_torch(lambda: operator("rope_tail")(q, table, 128, False),
                                     lambda: rope.rope_queries.reference(q, table, 128)), head * 2 * 192),
        Case("keys and values", beside_torch(lambda: operator("keys_values")(kv, k_pe, table, 128),
                                             lambda: rope.assemble_keys.reference(kv, k_pe, table, 128)),
             head * (256 + 192 + 128)),
        Case("keys and values, backward", {"csrc": lambda: operator("keys_values_backward")(
            grad_k, grad_v, table, 128)}, head * (192 + 128 + 256))]
    for case in cases:
        yield from bench.rows(case)


def attend(bench: Bench) -> Iterator[Row]:
    """Measure the core of MLA's attention as the FP8 recipe and context-parallel ranks call it: torch's flash attention
    on values that are padded to the keys' width, and cuDNN's on values as they are.
    """
    length, heads = (32, 2) if bench.small else (4096, 128)
    q, k, v, grad = (_random(bench, 1, heads, length, width) for width in (192, 192, 128, 128))
    scores, half = attention.Scores(192**-0.5, causal=True), heads * length * length  # a causal square, times 2
    kept = attention.attend.reference(q, k, v, scores)
    forward, backward = (q, k, v, scores), (grad, q, k, v, *kept, scores)
    for name, ours, cudnn, given, flops in (
            ("forward", attention.attend, alternatives.cudnn_attend, forward, half * (192 + 128)),
            ("backward", attention.attend_backward, alternatives.cudnn_attend_backward, backward,
             half * (3 * 192 + 2 * 128))):
        yield from bench.rows(Case(f"{heads} heads, sequence {length}, {name}", {
            "torch": lambda: ours.reference(*given), "cudnn": lambda: cudnn(*given)}, flops=flops, on_a_gpu=("cudnn",)))


def cross_entropy(bench: Bench) -> Iterator[Row]:
    tokens, vocabulary = (16, 512) if bench.small else (4096, 129280)
    logits, labels = _random(bench, tokens, vocabulary), torch.randint(vocabulary, (tokens,), device=bench.device)
    grad, size = torch.rand(tokens, device=bench.device), 2 * tokens * vocabulary
    top, total, _ = cross_entropy_statistics.reference(logits, labels, 0)

    def in_place():  # on copies, or the logits would soon be zeros: the copy is a third of what is timed
        work = logits.clone()
        operator("cross_entropy_gradient_")(work, labels, 0, top, total, grad)
        return work

    def loss(top_T, sum_T, label_T):
        return sum_T.log() - (label_T - top_T)

    cases = [
        Case("loss", {"torch": lambda: F.cross_entropy(logits.float(), labels, reduction="none"),
                      "torch, by parts": lambda: loss(*cross_entropy_statistics.reference(logits, labels, 0)),
                      "csrc": lambda: loss(*operator("cross_entropy_statistics")(logits, labels, 0))}, size),
        Case("gradient, and a copy of the logits", {
            "torch": lambda: cross_entropy_gradient.reference(logits.clone(), labels, 0, top, total, grad),
            "csrc": in_place}, 4 * size)]
    for case in cases:
        yield from bench.rows(case)


def _forms(product: Callable[..., torch.Tensor], *operands) -> dict[str, Callable[[], torch.Tensor]]:
    """Return csrc's product with 128x128 scales in each of its forms, by name."""
    return {"csrc": lambda: product(*operands), "csrc, tma_store": lambda: product(*operands, tma_store=True),
            "csrc, clusters": lambda: product(*operands, clusters=True),
            "csrc, both": lambda: product(*operands, tma_store=True, clusters=True)}


def products(bench: Bench) -> Iterator[Row]:
    """Measure dense FP8 GEMMs at DeepGEMM's shapes, of operands that are quantised before the time begins."""
    shapes = [(128, 256, 384)] if bench.small else [
        (4096, 7168, 16384), (4096, 7168, 2048), (4096, 4096, 7168), (4096, 24576, 1536), (4096, 32768, 512)]
    for m, n, k in shapes:
        x, w = _random(bench, m, k), _random(bench, n, k)
        operands = *encoding.quantize_1x128.reference(x), *encoding.quantize_128x128.reference(w)
        rows = *encoding.quantize_1x128.reference(x), *encoding.quantize_1x128.reference(w)
        yield from bench.rows(Case(f"{m} x {n} x {k}", {
            "torch, bf16": lambda: x @ w.t(), **_forms(gemm.scaled_mm, *operands),
            "csrc, 1x128 both": lambda: gemm.scaled_mm(*rows),
            "torch, scaled_mm": lambda: alternatives.torch_scaled_mm(*operands)}, flops=2 * m * n * k,
            on_a_gpu=("torch, scaled_mm",)))  # cuBLASLt's


def grouped_products(bench: Bench) -> Iterator[Row]:
    """Measure 8 local experts of V3, with 4,096 rows each, then with as many in all but unevenly, one with none."""
    experts, even, width, inner = (2, 128, 256, 256) if bench.small else (8, 4096, 7168, 4096)
    uneven = [0, 2 * even] if bench.small else [0, 100, 8000, 3000, 5000, 4096, 7000, 5572]
    for name, counts in (("even", [even] * experts), ("uneven", uneven)):
        rows = sum(counts)
        x, grad, w = _random(bench, rows, width), _random(bench, rows, inner), _random(bench, experts, inner, width)
        operands = *encoding.quantize_1x128.reference(x), *encoding.quantize_128x128.reference(w)
        tiles = torch.tensor([tile[1:] for tile in tile_rows(counts)], dtype=torch.int32, device=bench.device)
        columns = {}

        def wgrad():
            if not columns:
                columns.update(zip("ax", (operator("quantize_columns")(t, tiles, False) for t in (grad, x))))
            return gemm.grouped_scaled_mm_wgrad(*columns["a"], *columns["x"], counts)

        flops = 2 * rows * width * inner
        yield from bench.rows(Case(f"forward, {name}", {
            "torch, bf16": lambda: grouped_forward(x, w, counts),
            **_forms(gemm.grouped_scaled_mm, *operands, counts)}, flops=flops))
        yield from bench.rows(Case(f"wgrad, {name}", {
            "torch, bf16": lambda: grouped_wgrad(grad, x, counts), "csrc": wgrad}, flops=flops))


def references_agree(bench: Bench) -> Iterator[Row]:
    """Compare the FP8 reference with bfloat16: this error of FP8 itself puts the errors above into proportion."""
    x, w = _random(bench, 256, 512), _random(bench, 384, 512)
    operands = *encoding.quantize_1x128.reference(x), *encoding.quantize_128x128.reference(w)
    yield from bench.rows(Case("256 x 384 x 512", {
        "torch, bf16": lambda: x @ w.t(), "reference": lambda: fp8_gemm.scaled_mm.reference(*operands)},
        flops=2 * 256 * 384 * 512))
