"""Weights of FP8 products: quantised once for each gathering, held as codes alone, freed with what was gathered.

That layouts gather the same bits is in tests/parallel/test_fp8_layouts.py.
"""

from dataclasses import replace

import pytest
import torch
from small_models import enliven, forward, gradients_of, random_batch, whole_model
from test_fp8_recipe import FP8, MODEL
from torch.distributed.fsdp import MixedPrecisionPolicy

from megatron_deepseek.ops.fp8 import encoding, recipe as fp8_recipe, weight as fp8_weight
from megatron_deepseek.ops.fp8.weight import Fp8Shard, Fp8Weight
from megatron_deepseek.parallel.data import reshard, synchronize_gradients
from megatron_deepseek.torch_private import fsdp_parameter_group


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, Fp8Weight)}


@pytest.fixture
def quantised(monkeypatch) -> list[torch.Size]:
    """The weights that are quantised, each time."""
    shapes, quantize = [], encoding.quantize_both_ways

    def counted(weight):
        shapes.append(weight.shape)
        return quantize(weight)

    monkeypatch.setattr(encoding, "quantize_both_ways", counted)
    return shapes


def test_once_for_all_micro_batches(meshes, quantised):
    model = whole_model(MODEL, meshes, 128, precision=FP8)
    enliven(model)
    for step in range(2):
        quantised.clear()
        for micro_batch in range(3):
            synchronize_gradients(model, micro_batch == 2)
            forward(model, *random_batch(MODEL, 1, 128)).loss.backward()
            names = weights_of(model)
        assert len(quantised) == 2 * 5 + 3 + 3 + 2  # of attention twice, a dense MLP, a shared one, experts' two
    assert not names  # the last backward freed them


def test_as_if_quantised_at_each_use(meshes, monkeypatch):
    """The weight gathered as it is, and quantised by each product: the same loss and gradients, bit for bit."""
    outcomes = []
    for gathered in (fp8_recipe.Fp8Gemm.gathered, None):
        monkeypatch.setattr(fp8_recipe.Fp8Gemm, "gathered", gathered)
        model = whole_model(replace(MODEL, num_hidden_layers=2), meshes, 128, precision=FP8)
        enliven(model)
        outcome = forward(model, *random_batch(MODEL, 2, 128))
        assert bool(weights_of(model)) == (gathered is not None)
        outcome.loss.backward()
        outcomes.append((outcome.loss, gradients_of(model)))
    (loss, gradients), (expected_loss, expected) = outcomes
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_the_optimizers_step_is_seen(meshes):
    """After a change of the masters the next gathering has other codes, in the same tensors."""
    model = whole_model(MODEL, meshes, 128, precision=FP8)
    enliven(model)

    def codes():
        with torch.no_grad():
            forward(model, *random_batch(MODEL, 1, 128))
        found = {name: weight.blocks[0].clone() for name, weight in weights_of(model).items()}
        reshard(model)
        return found

    before, again = codes(), codes()
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local()
            local.mul_(torch.rand(local.shape, dtype=local.dtype) + 0.5)
    after = codes()
    same = [[torch.equal(one[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before]
            for one in (again, after)]
    assert all(same[0]) and not any(same[1])


def test_codes_alone_are_held_and_freed(meshes):
    model = whole_model(MODEL, meshes, 128, precision=FP8)
    with torch.no_grad():
        forward(model, *random_batch(MODEL, 1, 128))
    held = weights_of(model)
    groups = [group for module in model.modules() if (group := fsdp_parameter_group(module))]
    gathered = [p for group in groups for p in group.fsdp_params if type(p).__name__ != "FSDPParam"]
    assert len(gathered) == len(held) and held
    assert all(p.all_gather_outputs[0].untyped_storage().nbytes() == 0 for p in gathered)
    sizes = [weight.blocks[0].untyped_storage().nbytes() for weight in held.values()]
    assert all(size < 2 * weight.numel() for size, weight in zip(sizes, held.values()))  # 192 rows are padded to 256
    reshard(model)
    assert all(part.untyped_storage().nbytes() == 0 for weight in held.values() for part in weight.blocks)


class Mesh:
    def __init__(self, ranks: int):
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks


@pytest.mark.parametrize("shard, ranks, whole, in_codes", [
    ((128, 40), 2, (256, 40), True), ((256, 40), 3, (768, 40), True),
    ((64, 40), 2, (128, 40), False),  # a block of two shards
    ((128, 40), 2, (200, 40), False),  # the last rank has fewer rows
    ((2, 72, 40), 4, (8, 72, 40), True),  # experts are never cut
    ((2, 72, 40), 4, (7, 72, 40), False), ((256, 40), 1, (256, 40), False)])
def test_what_is_gathered_as_codes(shard, ranks, whole, in_codes):
    x = torch.randn(shard, generator=torch.Generator().manual_seed(0))
    given, note = Fp8Shard(x, in_fp8=True).fsdp_pre_all_gather(
        Mesh(ranks), torch.Size(whole), None, None, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    if not in_codes:
        assert [part.dtype for part in given] == [torch.bfloat16] and note == whole
        return
    q, scale = encoding.quantize_128x128(x.bfloat16())
    assert torch.equal(given[0], q.view(torch.uint8)) and torch.equal(given[1], scale) and note is None


def test_its_numbers_are_nobodys(meshes):
    weight = Fp8Weight(*encoding.quantize_both_ways(torch.randn(130, 40)), torch.bfloat16)
    assert weight.shape == (130, 40) and weight.dtype == torch.bfloat16
    assert torch.equal(fp8_weight.blocks_of(weight.detach())[1], weight.blocks[1])
    with pytest.raises(NotImplementedError, match="held in FP8 alone"):
        weight + 1
