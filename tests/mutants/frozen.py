"""Mistakes of training a part of the parameters."""

from mutant import of

UNIT = ("tests/unit/model/test_frozen.py",)
STAGES = ("tests/parallel/test_frozen_stages.py",)
LAYOUTS = ("tests/parallel/test_layouts.py",)
CHECKPOINTS = (*UNIT, "tests/parallel/test_checkpoints.py")
OFFLOAD = ("tests/unit/ops/test_offload.py",)

FROZEN = of(
    "model/architecture/freezing.py", UNIT,
    ("any(fnmatchcase(name, pattern) for pattern in patterns)", "any(fnmatchcase(name, f'*{p}*') for p in patterns)"),
) + of(
    "model/frozen.py", UNIT,
    ("if is_frozen(name, patterns):", "if name in patterns:"),
    ("for name, parameter in stage.named_parameters() if parameter.requires_grad)",
     "for name, parameter in stage.named_parameters())"),
) + of(
    "training/balance.py", UNIT, (" and module.gate.weight.requires_grad:", ":"),
) + of(
    "parallel/blockwise_attention.py", LAYOUTS,
    ("requires_grad=any(weight.requires_grad for weight in self.weights)", "requires_grad=False"),
    ("detach().requires_grad_(needed)", "detach().requires_grad_(False)"),
) + of(
    "parallel/shared.py", LAYOUTS, ("if not self.copies or not self.copies[0].requires_grad:", "if not self.copies:"),
) + of(
    "parallel/pipeline.py", STAGES,
    ("requires_grad=index >= self.first_trained)", "requires_grad=True)"),
    ("any(parameter.requires_grad for parameter in module.parameters())", "True"),
    ('    dist.all_reduce(trained, group=meshes.group("pp"))\n', ""),
) + of(
    "parallel/stage.py", STAGES,
    ("                reshard(self.submod)", "                pass"),
    ('if not self.is_last and not any(output.requires_grad for output in bwd_kwargs["stage_output"]):', "if False:"),
) + of(
    "parallel/zero_bubble.py", UNIT,
    ("        if ctx.needs_input_grad[1]:\n            (x,)", "        if True:\n            (x,)"),
    ("        if ctx.needs_input_grad[1]:\n            (x_RI,)", "        if True:\n            (x_RI,)"),
) + of(
    "ops/fp8/recipe.py", UNIT,
    ("gemm.keep(x, tiles) if weight.requires_grad else ()", "gemm.keep(x, tiles)"),
    ("        if any(ctx.needs_input_grad[3:]):", "        if ctx.needs_input_grad[2]:"),
    ("        if weight.requires_grad:\n            hidden", "        if True:\n            hidden"),
) + of(
    "ops/grouped_gemm.py", UNIT,
    ("ctx.needs_input_grad[1::-1]", "ctx.needs_input_grad[:2]"),
) + of(
    "ops/recompute.py", OFFLOAD,
    ("    if not torch.is_grad_enabled():\n        return lambda",
     "    if not any(x.requires_grad for x in inputs):\n        return lambda"),
) + of(
    "model/layer.py", OFFLOAD,
    ('any(getattr(each, "requires_grad", False) for each in (*args, *layer.parameters()))', "True"),
) + of(
    "checkpoint/job/subset.py", CHECKPOINTS,
    ("state.optimizer_steps - late.get(name, 0)", "state.optimizer_steps"),
    ("for name, first in state.late if name in trained}", "for name, first in state.late}"),
    ("if not any(moment in saved", "if not all(moment in saved"),
    ("fresh if has_moments else frozenset()", "fresh"),
    ("late |= dict.fromkeys(of_rank.fresh, state.optimizer_steps)", "late |= dict.fromkeys(of_rank.fresh, 0)"),
) + of(
    "checkpoint/train_state.py", CHECKPOINTS, ("batches,\n                          self.late)", "batches)"),
)
