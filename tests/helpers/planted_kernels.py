"""Wrong kernels in the place of the right ones, for this process: what a test of kernels must see.

As a script it runs tests on them, and prints which passed and which did not, as JSON; CASES is "all", or "outer" for
the first and the last case of each test alone:

    python tests/helpers/planted_kernels.py PLANT CASES TEST...

PLANT is a name of PLANTS, or `NAME in KERNEL` for one kernel alone.
"""

import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from megatron_deepseek.ops.backends import kernels

IN_PLACE = "cross_entropy_gradient_"
QUANTIZERS = ("quantize_rows", "quantize_columns", "quantize_both", "quantize_blocks", "quantize_e5m6", "retile_e5m6",
              "retile_columns", "swiglu_quantize_rows", "swiglu_quantize_columns", "swiglu_backward_quantize",
              "kept_swiglu_quantize_columns", "kept_swiglu_backward_quantize",
              "norm_quantize_rows", "norm_backward_quantize")
PRODUCTS = ("scaled_mm", "grouped_scaled_mm", "grouped_scaled_mm_wgrad")


def _each(result, function: Callable[[torch.Tensor], torch.Tensor]):
    return tuple(map(function, result)) if isinstance(result, tuple) else function(result)


def ones(name: str, right: Callable, *args):
    """Give ones of the right shapes, and look at nothing."""
    if name == IN_PLACE:
        args[0].fill_(1)
        return None
    return _each(kernels.FAKES[name](*args), lambda x: torch.ones_like(x, dtype=torch.float32).to(x.dtype))


def zeros(name: str, right: Callable, *args):
    """Give zeros of the right shapes."""
    if name == IN_PLACE:
        args[0].zero_()
        return None
    return _each(kernels.FAKES[name](*args), torch.zeros_like)


def lost(name: str, right: Callable, *args):
    """Give NaN, or of integers the largest."""
    if name == IN_PLACE:
        args[0].fill_(float("nan"))
        return None
    return _each(kernels.FAKES[name](*args), lambda x: torch.full_like(x, float("nan"), dtype=torch.float32).to(x.dtype)
                 if x.is_floating_point() else torch.full_like(x, torch.iinfo(x.dtype).max))


def no_last_column(name: str, right: Callable, *args):
    """Leave the last column of each result at zero, and of what is written in place as it was."""
    before = args[0][..., -1:].clone() if name == IN_PLACE else None
    result = right(*args)
    if before is not None:
        args[0][..., -1:] = before
        return None

    def shortened(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., -1:].view(torch.uint8).zero_()
        return x

    return _each(result, lambda x: shortened(x) if x.ndim > 1 else x)


def neighbouring_scale(name: str, right: Callable, *args):
    """Read or write the scale of the tile before, along K."""
    def shifted(x):
        return x.roll(1, -1) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.ndim > 1 else x

    if name in PRODUCTS:
        return right(*args[:1], shifted(args[1]), *args[2:])
    return _each(right(*args), shifted) if name in QUANTIZERS else right(*args)


def _transposed(scale: torch.Tensor) -> torch.Tensor:
    return scale.mT.reshape(scale.shape)


def transposed_scale(name: str, right: Callable, *args):
    """Read or write scales along the other dimension."""
    if name in PRODUCTS:
        return right(*args[:3], _transposed(args[3]), *args[4:])
    result = right(*args)
    if name not in QUANTIZERS:
        return result
    return _each(result, lambda x: _transposed(x) if x.dtype == torch.float32 and x.ndim > 1 else x)


def neighbouring_group(name: str, right: Callable, *args):
    """Take the rows, the weight or the slots of the group before."""
    if name == "route":
        return right((args[0] + 1) % args[1], *args[1:])
    if name == "grouped_scaled_mm":
        tiles = args[4].clone()
        tiles[:, 0] = tiles[:, 0].roll(1)
        return right(*args[:4], tiles, *args[5:])
    tables = {"grouped_scaled_mm_wgrad": 4, "gather_rows": 1, "combine_rows": 2, "combine_backward": 2}
    place = tables.get(name, next((i for i, x in enumerate(args) if name in QUANTIZERS and isinstance(x, torch.Tensor)
                                   and x.dtype == torch.int32), None))
    if place is None:
        return right(*args)
    return right(*args[:place], args[place].roll(1, 0), *args[place + 1:])


def misshapen(name: str, right: Callable, *args):
    """Give a column too many, except where the arguments of other kernels are made."""
    result = right(*args)
    if name in ("route", "quantize_rows", "quantize_columns", "quantize_blocks", "quantize_e5m6", IN_PLACE):
        return result
    return _each(result, lambda x: torch.cat([part := x.view(torch.uint8), part], -1).view(x.dtype))


def no_last_row(name: str, right: Callable, *args):
    """Leave the last row of each result at zero, and of what is written in place as it was."""
    before = args[0][-1:].clone() if name == IN_PLACE else None
    result = right(*args)
    if before is not None:
        args[0][-1:] = before
        return None

    def shortened(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[-1:].view(torch.uint8).zero_()
        return x

    return _each(result, shortened)


_BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}


def _step_down(x: torch.Tensor) -> torch.Tensor:
    """Make every other number of the sixth of 32 lanes smaller by one step, as truncation does."""
    if x.dtype not in _BITS:
        return x
    bits = x.contiguous().view(_BITS[x.dtype]).clone().flatten()
    lane = bits[5::64]
    lane -= ((lane & 0x7f) > 1).to(lane.dtype)
    return bits.view(x.dtype).view(x.shape)


def truncated_lane(name: str, right: Callable, *args):
    """Round down in one lane of a warp."""
    if name == IN_PLACE:
        right(*args)
        args[0].copy_(_step_down(args[0]))
        return None
    return _each(right(*args), _step_down)


def other_counts(name: str, right: Callable, *args):
    """Read a table that is one short in its largest entry, rows of a tile or tiles of a group: that of other counts."""
    def shortened(table: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        table[table[:, -1].argmax(), -1] -= 1
        return table

    if name not in (*PRODUCTS, *QUANTIZERS):
        return right(*args)
    return right(*(shortened(x) if isinstance(x, torch.Tensor) and x.dtype == torch.int32 else x for x in args))


PLANTS = {"ones": ones, "zeros": zeros, "lost": lost, "no last column": no_last_column,
          "neighbouring scale": neighbouring_scale, "misshapen": misshapen, "transposed scale": transposed_scale,
          "neighbouring group": neighbouring_group, "no last row": no_last_row, "truncated lane": truncated_lane,
          "table of other counts": other_counts}


def planted(plant: str, key: str = "CPU") -> torch.library.Library:
    """Put a plant's kernels in the place of those that are registered for `key`, as long as the result lives."""
    library = torch.library.Library(kernels.NAMESPACE, "IMPL")
    plant, _, alone = plant.partition(" in ")
    for name in (alone,) if alone else kernels.FAKES:
        right = torch.library.get_kernel(f"{kernels.NAMESPACE}::{name}", key)

        def call(keys, *args, name=name, right=right):
            return PLANTS[plant](name, lambda *given: right.call_boxed(keys, *given), *args)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that kernels are overridden
            library.impl(name, call, key, with_keyset=True, allow_override=True)
    return library


class Outcomes:
    """Plants the kernels once those that it replaces are loaded, and notes how each test ends."""

    def __init__(self, plant: str, cases: str):
        assert cases in ("all", "outer"), cases
        self.plant, self.cases, self.of_test = plant, cases, {}

    @pytest.fixture(scope="session", autouse=True)
    def wrong_kernels(self, device):
        library = planted(self.plant)
        yield library

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.cases == "outer":
            of_test = defaultdict(list)
            for item in items:
                of_test[item.nodeid.split("[")[0]].append(item)
            items[:] = [item for each in of_test.values() for item in dict.fromkeys((each[0], each[-1]))]

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of_test[report.nodeid.replace("\\", "/").split("/")[-1]] = report.outcome


if __name__ == "__main__":
    watcher = Outcomes(sys.argv[1], sys.argv[2])
    pytest.main(["-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[3:]], plugins=[watcher])
    print("\n" + json.dumps(watcher.of_test))
