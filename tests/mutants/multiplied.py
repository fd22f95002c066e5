"""Mistakes of products in float32 of bfloat16 operands (ops/products.py), and products that bypass them."""

from mutant import of

MULTIPLIED = of(
    ("tests/unit/ops/test_products.py",),
    ("products.multiply", "out[:, start:start + step] = a_MK @ b_KN[:, start:start + step].float()",
     "out[:, :step] = a_MK @ b_KN[:, start:start + step].float()"),
    ("products.multiply", "step = a_MK.float(), max(1,", "step = a_MK.float() + 0.02, max(1,"),
    ("multiply_each", "torch.bmm(a_BMK.float(), b_BKN.float()).to(a_BMK.dtype)", "torch.bmm(a_BMK, b_BKN)"),
    ("_Linear.forward", "x_needed, weight_needed = ctx.needs_input_grad[1::-1]",
     "x_needed, weight_needed = ctx.needs_input_grad[:2]"),
    ("_Linear.backward", "by_weight(grad, weight_NK) if ctx", "by_weight(-grad, weight_NK) if ctx"),
    ("fused_attention", "option.float() if", "option if"),
    ("_cpu_backward", "grad.float(), q.float(), k.float()", "grad.float(), k.float(), q.float()"),
    ("vocabulary_chunks._statistics", "multiply(functions.gradient(", "torch.mm(functions.gradient("),
    ("vocabulary_chunks._weight_gradient", "multiply(grad_logits.t(), x_TH, out=gradient_vH[rows])",
     "torch.mm(grad_logits.t(), x_TH, out=gradient_vH[rows])"),
    ("DeferringLinear.backward", "by_weight(grad, weight) if ctx", "grad @ weight if ctx"),
    ("grouped_wgrad", "multiply(round_up(grad).t()", "torch.mm(round_up(grad).t()"),
    ("frozen_weight._Multiply.backward", "by_weight(grad, weight.dense(grad.dtype))",
     "grad @ weight.dense(grad.dtype)"),
    ("CachedGQA._together", "fused_attention(", "torch.nn.functional.scaled_dot_product_attention("),
)
