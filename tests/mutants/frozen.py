"""Mistakes of training a part of the parameters."""

from mutant import of

UNIT = ("tests/unit/model/test_frozen.py",)
STAGES = ("tests/parallel/test_frozen_stages.py",)
LAYOUTS = ("tests/parallel/test_layouts.py",)
CHECKPOINTS = (*UNIT, "tests/parallel/test_checkpoints.py")
OFFLOAD = ("tests/unit/ops/test_offload.py",)

FROZEN = of(
    UNIT,
    ("is_frozen", "any(fnmatchcase(name, pattern) for pattern in patterns)",
     "any(fnmatchcase(name, f'*{p}*') for p in patterns)"),
    ("freeze", "if is_frozen(name, patterns):", "if name in patterns:"),
    ("trained_parameters", "for name, parameter in stage.named_parameters() if parameter.requires_grad)",
     "for name, parameter in stage.named_parameters())"),
) + of(
    UNIT,
    ("update_expert_bias", " and any(each.requires_grad for each in module.gate.parameters()):", ":"),
) + of(
    LAYOUTS,
    ("KeyValueProjection.anchor",
     "requires_grad=any(weight.requires_grad for weight in self.weights)", "requires_grad=False"),
    ("gradient_of_block", "detach().requires_grad_(needed)", "detach().requires_grad_(False)"),
) + of(
    LAYOUTS,
    ("SharedParameter.sum_gradients", "if not self.copies or not self.copies[0].requires_grad:", "if not self.copies:"),
) + of(
    STAGES,
    ("Travel.passed_on", "requires_grad=index >= self.first_trained)", "requires_grad=True)"),
    ("pipeline.first_trained_stage", "any(parameter.requires_grad for parameter in module.parameters())", "True"),
    ("pipeline.first_trained_stage", '    dist.all_reduce(trained, group=meshes.group("pp"))\n', ""),
) + of(
    STAGES,
    ("ReducingStage.backward_maybe_with_nosync", "                reshard(self.submod)", "                pass"),
    ("ReducingStage.backward_maybe_with_nosync",
     'if not self.is_last and not any(output.requires_grad for output in bwd_kwargs["stage_output"]):',
     "if False:"),
) + of(
    UNIT,
    ("DeferringLinear.backward", "        if ctx.needs_input_grad[1]:\n            x =",
     "        if True:\n            x ="),
    ("zero_bubble._GroupedGemm.backward", "        if ctx.needs_input_grad[1]:\n            x_RI =",
     "        if True:\n            x_RI ="),
) + of(
    UNIT,
    ("recipe._Multiply.forward", "gemm.keep(x, tiles) if weight.requires_grad else ()", "gemm.keep(x, tiles)"),
    ("_MultiplySwiGLU.backward", "        if any(ctx.needs_input_grad[3:]):", "        if ctx.needs_input_grad[2]:"),
    ("_MultiplySwiGLU.backward", "        if weight.requires_grad:\n            hidden",
     "        if True:\n            hidden"),
) + of(
    UNIT,
    ("grouped_gemm._GroupedGemm.forward", "ctx.needs_input_grad[1::-1]", "ctx.needs_input_grad[:2]"),
) + of(
    OFFLOAD,
    ("keep", "    if not torch.is_grad_enabled():\n        return lambda",
     "    if not any(x.requires_grad for x in inputs):\n        return lambda"),
) + of(
    OFFLOAD,
    ("_has_backward", 'any(getattr(each, "requires_grad", False) for each in (*args, *layer.parameters()))', "True"),
) + of(
    CHECKPOINTS,
    ("set_steps", "state.optimizer_steps - late.get(name, 0)", "state.optimizer_steps"),
    ("late_parameters", "for name, first in state.late if name in trained}", "for name, first in state.late}"),
    ("Subset.of", "if not any(moment in saved", "if not all(moment in saved"),
    ("Subset.of", "fresh if has_moments else frozenset()", "fresh"),
    ("late_parameters", "late |= dict.fromkeys(of_rank.fresh, state.optimizer_steps)",
     "late |= dict.fromkeys(of_rank.fresh, 0)"),
) + of(
    CHECKPOINTS,
    ("TrainState.after", "batches,\n                          self.late)", "batches)"),
)
