"""tests/gpu can fail: with wrong kernels in the place of the right ones, every file of it is red.

What a kernel is compared with there must not come from a kernel: references that dispatched would make every one of
these tests pass.
"""

import json
from pathlib import Path

import pytest
from forked import run_script

from megatron_deepseek.ops.backends.kernels import LIBRARY

ROOT = Path(__file__).parents[4]
FOLDER = ROOT / "tests" / "gpu"
COMPARING = ("cross_entropy", "e5m6", "forms", "gemm", "model", "permute", "quantize", "rope")
# The first and the last case of each test are enough to see these.
BY_OUTER_CASES = ("no last row", "no last column", "neighbouring scale", "truncated lane", "table of other counts")
EMPTY = ("0-16", "0-64", "shape3")  # in the names of cases without a number to compare


@pytest.fixture
def outcomes(tmp_path):
    """Return a function that runs tests of tests/gpu on wrong kernels, and returns how each ended."""
    def run(plant: str, cases: str, *tests: str) -> dict[str, str]:
        out, errors = tmp_path / "out", tmp_path / "errors"
        words = [str(ROOT / "tests/helpers/planted_kernels.py"), plant, cases,
                 *(str(FOLDER / f"test_kernels_{test}") for test in tests)]
        assert run_script(words, out, errors) == 0, errors.read_text()
        ended = json.loads(out.read_text().splitlines()[-1])
        if set(ended.values()) == {"skipped"}:
            pytest.skip("there is no emulation here: tests/gpu/conftest.py")
        return {name.removeprefix("test_kernels_"): outcome for name, outcome in ended.items()}

    if LIBRARY.exists():
        pytest.skip("kernels are planted in the emulation, which cannot be loaded beside the library of a GPU")
    return run


def test_every_file_is_known():
    files = {path.stem.removeprefix("test_kernels_") for path in FOLDER.glob("test_*.py")}
    # "traced" and "registration" are about names, shapes and derivatives, "alternatives" about other libraries' kernels
    assert files == {*COMPARING, "traced", "registration", "alternatives"}


@pytest.mark.parametrize("plant, cases, least", [
    ("ones", "outer", 80), pytest.param("ones", "all", 230, marks=pytest.mark.slow),
    pytest.param("zeros", "outer", 80, marks=pytest.mark.slow),
    pytest.param("lost", "outer", 80, marks=pytest.mark.slow)])
def test_numbers_of_nobody_are_seen_by_every_test(outcomes, plant, cases, least):
    """But for those of empty tensors, of what kernels do not take, and of whether a kernel worked in place. `least` is
    how many tests must have run.
    """
    traced = ("traced.py::test_compiled[product]", "traced.py::test_compiled[rope_queries]")  # of many that take long
    ended = outcomes(plant, cases, *(f"{name}.py" for name in COMPARING), *traced)
    passed = {name for name, outcome in ended.items() if outcome == "passed"}
    of_empty = {name for name in passed if any(part in name for part in EMPTY)}
    assert len(ended) > least
    assert passed - of_empty == {"forms.py::test_what_kernels_do_not_take",
                                 "forms.py::test_a_second_backward_of_the_loss_is_an_error",
                                 *(["cross_entropy.py::test_nan_is_not_hidden"] if plant == "lost" else [])}


@pytest.mark.parametrize("plant, tests", [
    pytest.param("transposed scale", (
        "e5m6.py::test_retile", "forms.py::test_linear_of_three_products", "gemm.py::test_dense",
        "gemm.py::test_dense_with_scales_of_rows", "model.py::test_kernels_and_references_agree",
        "quantize.py::test_rows", "quantize.py::test_blocks"), marks=pytest.mark.slow),
    pytest.param("neighbouring group", (
        "forms.py::test_experts_of_three_products", "forms.py::test_permutations", "gemm.py::test_rows_grouped",
        "gemm.py::test_depth_grouped", "model.py::test_kernels_and_references_agree", "permute.py::test_route",
        "permute.py::test_gather", "quantize.py::test_columns_of_groups", "quantize.py::test_retile"),
        marks=pytest.mark.slow),
    pytest.param("no last row", (
        "cross_entropy.py::test_statistics", "e5m6.py::test_quantize", "forms.py::test_rope",
        "gemm.py::test_bfloat16_is_float32_rounded_to_nearest", "gemm.py::test_tall_tiles",
        "model.py::test_kernels_and_references_agree", "permute.py::test_gather", "quantize.py::test_rows",
        "rope.py::test_tail"), marks=pytest.mark.slow),
    pytest.param("no last column", (
        "cross_entropy.py::test_gradient_in_place", "e5m6.py::test_quantize", "forms.py::test_rope",
        "gemm.py::test_dense", "model.py::test_kernels_and_references_agree", "permute.py::test_gather",
        "quantize.py::test_rows", "rope.py::test_tail"), marks=pytest.mark.slow),
    pytest.param("neighbouring scale", (
        "e5m6.py::test_quantize", "forms.py::test_linear_of_three_products", "gemm.py::test_dense",
        "model.py::test_kernels_and_references_agree", "quantize.py::test_retile"), marks=pytest.mark.slow),
    pytest.param("truncated lane", (
        "cross_entropy.py::test_gradient_in_place", "e5m6.py::test_retile", "forms.py::test_linear_of_three_products",
        "gemm.py::test_bfloat16_is_float32_rounded_to_nearest", "gemm.py::test_dense",
        "model.py::test_kernels_and_references_agree", "permute.py::test_combine_with_weights",
        "quantize.py::test_rows", "rope.py::test_tail"), marks=pytest.mark.slow),
    pytest.param("table of other counts", (
        "e5m6.py::test_retile", "forms.py::test_experts_of_three_products", "gemm.py::test_rows_grouped",
        "gemm.py::test_depth_grouped", "quantize.py::test_columns_of_groups", "quantize.py::test_retile"),
        marks=pytest.mark.slow),
    ("misshapen", ("registration.py::test_operator",))])
def test_a_wrong_kernel_is_seen_in_each_file(outcomes, plant, tests):
    ended = outcomes(plant, "outer" if plant in BY_OUTER_CASES else "all", *tests)
    red = {name.split("[")[0] for name, outcome in ended.items() if outcome == "failed"}
    assert red == set(tests)
