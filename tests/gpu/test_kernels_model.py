"""A whole small model, forward and backward, on the kernels and on the references: the same losses and gradients.

In bfloat16 both round at the same places but add in other orders. In FP8 such a difference moves codes by a step, a
sixteenth: noise of 2^-9 on every linear's output moves this model's gradients by 21 %, measured on the references. So
every operator that the model calls is compared with its reference on the very inputs that it got, to rounding.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from references import REFERENCES
from torch.utils._pytree import tree_leaves

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions, Precision, build_stages
from megatron_deepseek.model.step import MicroBatch, Rows, StepContext
from megatron_deepseek.ops.backends import registry
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.settings import LossSettings
from megatron_deepseek.training.next_token import NextToken

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=144, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=32,
    q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, moe_intermediate_size=32,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1,
    topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5)
LENGTH = 16


@pytest.fixture(scope="module")
def job():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_model(device, in_fp8: bool):
    stage = Stage(True, tuple(range(CONFIG.num_hidden_layers)), (), True)
    precision = Precision(torch.float32, torch.bfloat16, in_fp8)
    (model,) = build_stages(CONFIG, [stage], build_meshes(Layout(), device), LENGTH,
                            BuildOptions(seed=1, precision=precision,
                                         loss=LossSettings(moe_router_force_load_balancing=True)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # the initial weights are small, and so would be what a mistake changes
    return model


def run(model, device) -> tuple[float, dict[str, torch.Tensor]]:
    tokens = torch.randint(64, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0)).to(device)
    rows = Rows(tokens[:, None, 1:], torch.ones(2, 1, LENGTH, device=device))
    objective = NextToken()
    loss = model(tokens[:, :-1], MicroBatch(rows),
                 StepContext(2, partial(objective.contribution, counts={"weight_0": 2.0 * LENGTH})))
    loss.backward()
    whole = {name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
             for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.item(), whole


class Ours:
    """The kernels in the place of the references, each call made of both and compared: they are given the same inputs,
    so what they give differs by their own rounding alone, however the model amplifies it.
    """

    def __init__(self, monkeypatch):
        self.used = set()
        choices = {operator: self.choice(operator) for operator in registry.CANDIDATES}
        self.with_one = {operator for operator, choice in choices.items() if choice.function}
        monkeypatch.setattr(registry, "choices", lambda: choices)

    def choice(self, operator: str) -> registry.Choice:
        (function,) = [c.load() for c in registry.CANDIDATES[operator] if c.name == "csrc"] or [None]

        def call(*args, **kwargs):
            given = [x.detach().clone() if type(x) is torch.Tensor else x for x in args]  # some kernels work in place
            result = function(*args, **kwargs)
            if result is not NotImplemented:
                self.used.add(operator)
                self.compare(operator, result, given, kwargs)
            return result

        return registry.Choice(operator, "csrc", "a test", call if function else None)

    def compare(self, operator: str, result, args, kwargs) -> None:
        grouped = any(isinstance(x, list) for x in args)
        if operator == "weighted_sum" or grouped and operator in PADDED:
            return
        with torch.no_grad():
            expected = REFERENCES[operator](*args, **kwargs)
        for got, wanted in zip(leaves(result), leaves(expected), strict=True):
            agree(operator, got, wanted)


# 128x1 tiles of groups lie in memory otherwise for kernels than for references, and so does what is made of them
# (test_kernels_quantize.py and test_kernels_gemm.py compare those). A sum of scaled rows is compared there too, for the
# reference rounds the weights first.
PADDED = {"quantize_128x1", "retile_128x1", "quantize_rows_and_columns", "quantize_swiglu_columns",
          "swiglu_backward_tiles", "grouped_scaled_mm_wgrad"}


def leaves(result) -> list[torch.Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]


def agree(operator: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Codes but for one in 200, which may round the other way where the kernel makes what it quantises; others by
    their norm: bfloat16's rounding, half of 2^-8, of each.
    """
    assert got.shape == expected.shape and got.dtype == expected.dtype or not got.is_floating_point(), operator
    if got.dtype == torch.float8_e4m3fn:
        assert (got.view(torch.uint8) != expected.view(torch.uint8)).float().mean() <= 5e-3, operator
    elif got.numel():
        error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        assert error < 2**-8, (operator, float(error))


@pytest.mark.parametrize("in_fp8", [False, True], ids=["bf16", "fp8"])
def test_kernels_and_references_agree(device, job, in_fp8, monkeypatch):
    with monkeypatch.context() as alone:
        none = {operator: registry.Choice(operator, registry.REFERENCE, "a test") for operator in registry.CANDIDATES}
        alone.setattr(registry, "choices", lambda: none)
        expected_loss, expected = run(make_model(device, in_fp8), device)
    ours = Ours(monkeypatch)
    loss, got = run(make_model(device, in_fp8), device)
    assert abs(loss - expected_loss) < 0.01 * expected_loss
    assert ours.used == ours.with_one - unused(device, in_fp8)
    if not in_fp8:
        errors = {name: float((got[name] - grad).norm() / grad.norm()) for name, grad in expected.items()}
        assert max(errors.values()) < 0.05, errors


def unused(device, in_fp8: bool) -> set[str]:
    """What this model does not reach: exchanges between ranks; on a CPU, torch's own loss; a weight's quantisation for
    the forward alone, which was gathered both ways; 128x1 tiles alone, which come from the tiles that were kept.
    """
    losses = set() if device.type == "cuda" else {"cross_entropy_statistics", "cross_entropy_gradient"}
    of_fp8 = {name for name in registry.CANDIDATES if "quantize" in name or "scaled" in name or "tile" in name}
    if in_fp8:
        return {"permute", "quantize_128x128", "quantize_128x1"} | losses
    return {"permute", "gather_rows"} | losses | of_fp8
