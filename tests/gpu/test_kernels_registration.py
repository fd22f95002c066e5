"""Every operator's schema, shapes without data and derivative registration, by torch's own checker."""

import re

import pytest
import torch

from megatron_deepseek.ops.backends import kernels
from megatron_deepseek.ops.backends.kernels import operator

CHECKS = ("test_autograd_registration", "test_faketensor")


def bf16(*shape: int, device) -> torch.Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def samples(device) -> dict[str, tuple]:
    """Arguments of each operator; gradients are asked for where there is a derivative."""
    table = torch.randn(2, 3, 4, device=device)
    experts = torch.randint(4, (5, 2), device=device)
    copy_of_slot, slot_of_copy, *_ = operator("route")(experts, 4, 8)
    places = copy_of_slot, slot_of_copy.view(5, 2)
    tiles = torch.tensor([[0, 5], [5, 3]], dtype=torch.int32, device=device)
    x, weight, rstd = bf16(8, 16, device=device), torch.rand(16, device=device), torch.rand(8, device=device)
    q, s = operator("quantize_rows")(x, False)
    packed = operator("quantize_e5m6")(x)
    columns = operator("quantize_columns")(x, tiles, False)
    blocks = operator("quantize_blocks")(bf16(2, 24, 16, device=device), False, False)[:2]
    labels, row = torch.tensor([1, 2], device=device), torch.rand(2, device=device)
    row_tiles = torch.tensor([[0, 0, 5], [1, 5, 3]], dtype=torch.int32, device=device)
    groups = torch.tensor([[0, 1], [1, 1]], dtype=torch.int32, device=device)
    leaf = torch.Tensor.requires_grad_
    return {
        "rope_tail": (leaf(bf16(2, 3, 4, 24, device=device)), table, 16, False),
        "keys_values": (leaf(bf16(2, 3, 4, 24, device=device)), leaf(bf16(2, 3, 8, device=device)), table, 16),
        "keys_values_backward": (bf16(2, 3, 4, 24, device=device), bf16(2, 3, 4, 8, device=device), None, 16),
        "cross_entropy_statistics": (bf16(2, 24, device=device), labels, 0),
        "cross_entropy_gradient_": (bf16(2, 24, device=device), labels, 0, row, row, row),
        "route": (experts, 4, 8),
        "gather_rows": (leaf(bf16(5, 16, device=device)), *places),
        "combine_rows": (leaf(bf16(len(copy_of_slot), 16, device=device)), *places,
                         leaf(torch.rand(5, 2, device=device))),
        "combine_backward": (bf16(5, 16, device=device), bf16(len(copy_of_slot), 16, device=device), copy_of_slot,
                             torch.rand(5, 2, device=device)),
        "quantize_rows": (x, True), "quantize_columns": (x, tiles, False), "quantize_both": (x, None, False),
        "quantize_blocks": (bf16(2, 24, 16, device=device), True, False), "retile_columns": (q, s, tiles, False),
        "quantize_e5m6": (x,), "dequantize_e5m6": (*packed, True), "retile_e5m6": (*packed, tiles, True),
        "swiglu_quantize_rows": (x, x, False), "swiglu_quantize_columns": (x, x, None, False),
        "swiglu_backward_quantize": (x, x, x, None, True),
        "kept_swiglu_quantize_columns": (q, s, q, s, tiles, False),
        "kept_swiglu_backward_quantize": (x, q, s, q, s, tiles, False),
        "norm_quantize_rows": (x, weight, 1e-6, True, False),
        "norm_backward_quantize": (x, x, weight, rstd, tiles, False),
        "scaled_mm": (q, s, q, s, False, True, False),
        "grouped_scaled_mm": (q, s, *blocks, row_tiles, False, True, False, True),
        "grouped_scaled_mm_wgrad": (*columns, *columns, groups, False),
    }


def test_nothing_is_forgotten(device):
    """Each operator that the bindings declare has shapes without data, and is checked here."""
    declared = {name for path in kernels.SOURCES.glob("*_binding.cpp")
                for name in re.findall(r'm\.def\(\s*"(\w+)\(', path.read_text())}
    assert set(samples(device)) == set(kernels.FAKES) == declared


@pytest.mark.parametrize("name", kernels.FAKES)
def test_operator(device, name):
    """Torch's check of schemas (what is written to, what aliases) does arithmetic, which E4M3 inputs don't have."""
    arguments = samples(device)[name]
    has_codes = any(isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn for x in arguments)
    torch.library.opcheck(operator(name), arguments, test_utils=CHECKS if has_codes else ("test_schema", *CHECKS))


def test_wrong_arguments_are_refused(device):
    """By name, before anything is launched."""
    with pytest.raises(RuntimeError, match="multiple of 8"):
        operator("quantize_rows")(bf16(2, 12, device=device), False)
    with pytest.raises(RuntimeError, match="another dtype"):
        operator("combine_rows")(torch.zeros(2, 8, device=device), *(torch.zeros(
            shape, dtype=torch.int32, device=device) for shape in ((2,), (1, 2))), None)
    with pytest.raises(RuntimeError, match="contiguous"):
        operator("quantize_rows")(bf16(16, 16, device=device).t(), False)


def test_a_kernel_waits_for_what_its_stream_has_before(device):
    """In the emulation each call has a stream of its own, and a kernel on another one is an error (csrc/launch.cuh)."""
    if device.type != "cuda":
        pytest.skip("streams are a GPU's")
    x, busy, side = bf16(256, 4096, device=device), bf16(4096, 4096, device=device), torch.cuda.Stream()
    expected, late = operator("quantize_rows")(x, False), torch.zeros_like(x)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(200):
            busy = busy @ busy
        late.copy_(x)
        got = operator("quantize_rows")(late, False)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(mine.view(torch.uint8), wanted.view(torch.uint8)) for mine, wanted in zip(got, expected))


def test_a_kernel_runs_on_its_tensors_device(device):
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = bf16(256, 4096, device=device)
    expected, got = operator("quantize_rows")(x, False), operator("quantize_rows")(x.to("cuda:1"), False)
    assert all(torch.equal(mine.cpu().view(torch.uint8), wanted.cpu().view(torch.uint8))
               for mine, wanted in zip(got, expected))
