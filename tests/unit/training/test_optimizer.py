"""AdamW with moments in bfloat16, against the update written out for each element with a rounding of its own."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megatron_deepseek.settings import OptimizerSettings
from megatron_deepseek.training import optimizer as optimizer_module
from megatron_deepseek.training.optimizer import (
    NamedParameter, ShardedAdamW, build_optimizer, clip_gradients, set_learning_rate)

RATE = 1e-2
MIXES = (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16"))


def bfloat16(x: float) -> float:
    """`x` to 8 significant bits, to nearest, ties to even (Python's own rounding of halves)."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 2**8), exponent - 8)


def exactly(x: float) -> float:
    return x


ROUNDING = {"bf16": bfloat16, "fp32": exactly}


def sharded(mesh, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(DTensor.from_local(values.clone(), mesh, [Shard(0)]))


def built(parameters: list[nn.Parameter], settings: OptimizerSettings) -> ShardedAdamW:
    made = build_optimizer([NamedParameter(str(i), p) for i, p in enumerate(parameters)], settings)
    set_learning_rate(made, RATE)
    return made


@pytest.fixture
def mesh(meshes):
    return init_device_mesh("cpu", (1,))


def gradient(step: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_rank_without_parameters_has_an_optimizer(moments):
    """Its pipeline stages are empty."""
    optimizer = built([], OptimizerSettings(exp_avg_dtype=moments, exp_avg_sq_dtype=moments))
    optimizer.step()
    clip_gradients([], torch.tensor(2.0), 1.0)
    assert not optimizer.state


def test_rounding_of_the_reference():
    """1 + 2^-8 lies between 1 and 1 + 2^-7, and 1 is even; 1 + 3 * 2^-8 goes up to the even 1 + 2^-6."""
    assert [bfloat16(1 + n / 2**8) for n in (1, 1.01, 2, 3)] == [1.0, 1 + 2**-7, 1 + 2**-7, 1 + 2**-6]


@pytest.mark.parametrize("exp_avg, exp_avg_sq", MIXES)
@pytest.mark.parametrize("elements", [16, 1 << 22])
def test_update_of_each_element(mesh, monkeypatch, exp_avg, exp_avg_sq, elements):
    """Four steps; the weight sees this step's moments before they are rounded for the next."""
    monkeypatch.setattr(optimizer_module, "STRETCH_ELEMENTS", elements)
    settings = OptimizerSettings(exp_avg_dtype=exp_avg, exp_avg_sq_dtype=exp_avg_sq, weight_decay=0.1)
    parameter = sharded(mesh, gradient(99, (5, 7)))
    adam = built([parameter], settings)
    weights, m, v = parameter.to_local().flatten().tolist(), [0.0] * 35, [0.0] * 35
    for step in range(1, 5):
        parameter.grad = sharded(mesh, gradient(step, (5, 7))).detach()
        adam.step()
        for i, g in enumerate(gradient(step, (5, 7)).flatten().tolist()):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g
            moved = m[i] / (1 - 0.9**step) / (math.sqrt(v[i] / (1 - 0.95**step)) + 1e-8)
            weights[i] = weights[i] * (1 - RATE * 0.1) - RATE * moved
            m[i], v[i] = ROUNDING[exp_avg](m[i]), ROUNDING[exp_avg_sq](v[i])
    state = adam.state[parameter]
    for found, expected in ((parameter, weights), (state["exp_avg"], m), (state["exp_avg_sq"], v)):
        torch.testing.assert_close(found.to_local().detach().double().flatten(),
                                   torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_moments_are_kept_in_what_was_asked_for(mesh):
    parameter = sharded(mesh, torch.ones(4, 4))
    for names, wanted in {("fp32", "fp32"): (torch.float32,) * 2, ("bf16", "fp32"): (torch.bfloat16, torch.float32),
                          ("bf16", "bf16"): (torch.bfloat16,) * 2}.items():
        adam = built([parameter], OptimizerSettings(exp_avg_dtype=names[0], exp_avg_sq_dtype=names[1]))
        for _ in range(2):
            parameter.grad = torch.ones_like(parameter)
            adam.step()
        state = adam.state[parameter]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == wanted
        assert state["step"].item() == 2


@pytest.mark.parametrize("exp_avg, exp_avg_sq", MIXES)
def test_pieces_and_places_change_no_bit(mesh, monkeypatch, exp_avg, exp_avg_sq):
    """float32 weights in one tensor, or cut anywhere into several: the same bits of weights and moments."""
    outcomes = []
    for cuts in ([1000], [1, 16, 17, 100, 866], [333] * 3 + [1]):
        monkeypatch.setattr(optimizer_module, "STRETCH_ELEMENTS", 16 * len(cuts))
        parameters = [sharded(mesh, part) for part in gradient(7, (1000,)).float().split(cuts)]
        adam = built(parameters, OptimizerSettings(exp_avg_dtype=exp_avg, exp_avg_sq_dtype=exp_avg_sq))
        for step in range(5):
            for parameter, part in zip(parameters, gradient(step, (1000,)).float().split(cuts)):
                parameter.grad = sharded(mesh, part).detach()
            adam.step()
        tensors = [[p.detach(), adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"]] for p in parameters]
        outcomes.append([torch.cat([t.to_local() for t in each]) for each in zip(*tensors)])
    for other in outcomes[1:]:
        assert all(torch.equal(one, same) for one, same in zip(outcomes[0], other, strict=True))


def test_parameters_without_a_gradient_or_without_elements_stay(mesh):
    parameters = [sharded(mesh, torch.ones(size, 2)) for size in (0, 1, 3)]
    adam = built(parameters, OptimizerSettings(exp_avg_dtype="bf16"))
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    assert parameters[1].to_local()[0, 0].item() == pytest.approx(1 - RATE * 0.1 - RATE, rel=1e-6)
    assert torch.equal(parameters[2].to_local(), torch.ones(3, 2))


@pytest.mark.parametrize("beta, halves", [(0.95, True), (1 - 2**-8, True), (0.999, False)])
def test_why_slow_decay_is_refused(beta, halves):
    """A bfloat16 moment times 0.999 rounds back to itself, whatever follows; at 1 - 2^-8 it still falls."""
    moment = torch.tensor(1.9921875, dtype=torch.bfloat16)
    for _ in range(2000):
        moment = (moment.float() * beta).to(torch.bfloat16)
    assert (moment.item() < 1.0) is halves
