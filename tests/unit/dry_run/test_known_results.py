"""Results that are remembered against those of torch's own FakeTensorMode: shapes, strides, dtypes and storages."""

import pytest
import torch

from megatron_deepseek.dry_run.fake_tensors import NothingComputed
from megatron_deepseek.dry_run.known_results import KnownResults
from megatron_deepseek.torch_private import FakeTensorMode

_aten = torch.ops.aten


def form(x: torch.Tensor) -> tuple:
    return tuple(x.shape), x.stride(), x.dtype, x.untyped_storage().nbytes()


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty(6, 4), torch.empty(4, 6, dtype=torch.bfloat16).mT, torch.empty(6, 4, dtype=torch.int64)


def results() -> list[torch.Tensor]:
    """Return what operators give that differ from each other in one thing: a type, an order, a default, a shape."""
    x, turned, numbers = operands()
    made = [numbers * 2, numbers * 2.0, numbers * True, numbers / 2, x * turned, turned * x, turned * turned,
            turned + 1.0, turned.clone(memory_format=torch.contiguous_format) + 1.0, x.sum(0), x.sum(1), x.sum(),
            x[:3] * 2, x[:, :2] * 2, torch.ones_like(turned),
            torch.ones_like(x, dtype=torch.float64), torch.cat([x, x]), torch.cat([x, x], 1), torch.cat([x, x, x]),
            turned.clone(), turned.clone(memory_format=torch.contiguous_format), x > 0, x.to(torch.bfloat16),
            x.masked_fill(x > 0, 1.0), torch.where(x > 0, x, turned), x.new_empty(3), x.new_empty(3, dtype=torch.int32)]
    return [*made, *x.topk(2, 1), *x.topk(2, 0), *x.sort(0)]


def test_as_torch_says():
    """Once asked and once remembered."""
    with FakeTensorMode():
        expected = [form(each) for each in results()]
    with NothingComputed():
        first, again = results(), results()
    assert [form(each) for each in first] == [form(each) for each in again] == expected
    storages = {each.untyped_storage()._cdata for each in [*first, *again]}  # noqa: SLF001 (torch's)
    assert len(storages) == len(first) + len(again)


def test_under_another_default_dtype():
    numbers = torch.empty(4, dtype=torch.int64)
    with NothingComputed() as mode:
        assert (mode.from_tensor(numbers) / 2).dtype == torch.float32
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert (mode.from_tensor(numbers) / 2).dtype == torch.bfloat16
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("operator, args", [
    (_aten.view.default, (torch.empty(4, device="meta"), [2, 2])),
    (_aten.add_.Tensor, (torch.empty(4, device="meta"), 1)),
    (_aten.mul.out, (torch.empty(4, device="meta"), torch.empty(4, device="meta")))])
def test_what_is_no_new_tensor_is_asked_each_time(operator, args):
    known, asked = KnownResults(), []
    for _ in range(2):
        known.of(operator, args, {}, lambda: asked.append(1) or torch.empty(4, device="meta"))
    assert len(asked) == 2


@pytest.mark.parametrize("result", [
    lambda x: x, lambda x: torch.empty(8, device="meta")[:4], lambda x: torch.empty(8, device="meta")[4:],
    lambda x: [whole := torch.empty(4, device="meta"), whole.view(2, 2)]], ids=["given", "larger", "offset", "shared"])
def test_what_shares_or_wastes_memory_is_asked_each_time(result):
    """Whatever an operator's schema says of it."""
    known, x, asked = KnownResults(), torch.empty(4, device="meta"), []
    for _ in range(2):
        known.of(_aten.mul.Tensor, (x, 2), {}, lambda: asked.append(1) or result(x))
    assert len(asked) == 2


def test_a_result_is_computed_once():
    known, x, asked = KnownResults(), torch.empty(4, device="meta"), []
    given = [known.of(_aten.mul.Tensor, (x, 2), {}, lambda: asked.append(1) or (x * 2, [None, 3])) for _ in range(2)]
    assert len(asked) == 1
    assert form(given[1][0]) == form(x)
    assert type(given[1]) is tuple and given[1][1] == [None, 3]
