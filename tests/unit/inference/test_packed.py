"""Packed weights: products, and answers, are those of ordinary weights but for rounding."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_engines import V3_MTP, engine, loaded
from small_models import relative_error

from megatron_deepseek.inference.packed import PackedWeight, can_pack, pack
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.ops.grouped_gemm import grouped_gemm

CPU = torch.device("cpu")
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # roundings of the result
DTYPES = [pytest.param(dtype, marks=pytest.mark.skipif(not can_pack(CPU, dtype), reason="not on this processor"))
          for dtype in BOUND]
pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="this torch has no oneDNN")


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 70])
def test_products_are_those_of_the_weight(dtype, rows):
    weight, x = random(20, 24, dtype=dtype), random(2, rows, 24, dtype=dtype)
    packed = PackedWeight.pack(weight)
    assert relative_error(packed.multiply(x), F.linear(x.double(), weight.double())) < BOUND[dtype]
    assert packed.dense(dtype).equal(weight) and packed.shape == weight.shape and packed.nbytes >= weight.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_multiply_their_own_rows(dtype):
    weight, counts = random(4, 20, 24, dtype=dtype), [3, 0, 70, 1]
    x = random(sum(counts), 24, dtype=dtype)
    packed = PackedWeight.pack(weight)
    expected = grouped_gemm(x.double(), weight.double(), counts)
    assert relative_error(packed.multiply_grouped(x, counts), expected) < BOUND[dtype]
    assert packed.multiply_grouped(x[:0], [0] * 4).shape == (0, 20) and packed.dense(dtype).equal(weight)


def test_answers_of_a_packed_model_are_the_same(meshes):
    parameters = SamplingParameters(temperature=0.8, seed=1, max_tokens=12, logprobs=0)
    plain, packed = loaded(V3_MTP, meshes), loaded(V3_MTP, meshes)
    pack(packed.stage)
    assert sum(parameter.numel() for parameter in packed.stage.parameters()) < 0.4 * sum(
        parameter.numel() for parameter in plain.stage.parameters())  # of embedding, norms, routers and W_kvb
    (expected,), (got,) = (engine(model, draft_tokens=1).generate([[3, 1, 4, 1, 5]], parameters)[0]
                           for model in (plain, packed))
    assert got.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-5)
    assert replace(got, log_probabilities=None, top_log_probabilities=None) == replace(
        expected, log_probabilities=None, top_log_probabilities=None)


def test_float64_is_not_packed(meshes):
    model = loaded(V3_MTP, meshes, torch.float64)
    pack(model.stage)
    assert not can_pack(CPU, torch.float64) and isinstance(model.stage.lm_head.weight, torch.Tensor)
