"""Products on the tape of bytes, by hand: what ops/fp8/recipe.py makes and frees, and what waits for weight gradients.
"""

import pytest

from megatron_deepseek.planning.byte_tape import Tape
from megatron_deepseek.planning.layer_shapes import Kept
from megatron_deepseek.planning.numbers import Numbers

ROWS, WIDTH, OUTPUTS = 256, 512, 1024
GRADIENT, RESULT = 2 * ROWS * OUTPUTS, 2 * ROWS * WIDTH  # bytes in bfloat16
TILES_OF_GRADIENT, TILES_OF_RESULT = ROWS * (OUTPUTS + 4 * 8), ROWS * (WIDTH + 4 * 4)
INPUT = {True: TILES_OF_RESULT, False: RESULT}  # what is kept of the input, in FP8 and in bfloat16


def tape_of(fp8: bool, deferred: bool) -> Tape:
    """Return a tape on which an input is kept, and the gradient of the layer's output is there."""
    kept = Kept("input", INPUT[fp8])
    tape = Tape([kept], [kept], deferred, Numbers(fp8=fp8))
    tape.make(GRADIENT)
    return tape


def left(tape: Tape) -> float:
    """Return the bytes that are there now."""
    tape.make(0)
    return tape.moments[-1].bytes


@pytest.mark.parametrize("fp8, deferred, most, leaves", [
    (False, False, GRADIENT + RESULT, RESULT - INPUT[False]),
    (False, True, GRADIENT + RESULT, GRADIENT + RESULT),
    (True, False, GRADIENT + 2 * TILES_OF_GRADIENT + RESULT + TILES_OF_RESULT, RESULT - INPUT[True]),
    (True, True, GRADIENT + 2 * TILES_OF_GRADIENT + RESULT, RESULT + TILES_OF_GRADIENT)])
def test_a_product(fp8, deferred, most, leaves):
    tape = tape_of(fp8, deferred)
    tape.product("input", GRADIENT, RESULT, WIDTH * OUTPUTS)
    assert max(each.bytes for each in tape.moments) == most
    assert left(tape) == leaves
    assert tape.moments[-1].dense == (0 if deferred else WIDTH * OUTPUTS)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_product_of_a_frozen_weight(fp8, deferred):
    """It makes its input's gradient alone, of tiles by rows in FP8, and nothing of it waits."""
    tape = Tape([], [], deferred, Numbers(fp8=fp8), frozenset(["input"]))
    tape.make(GRADIENT)
    tape.product("input", GRADIENT, RESULT, WIDTH * OUTPUTS)
    assert max(each.bytes for each in tape.moments) == GRADIENT + fp8 * TILES_OF_GRADIENT + RESULT
    assert left(tape) == RESULT
    assert tape.moments[-1].dense == 0
    tape.products_of_swiglu("input", 1, RESULT, GRADIENT, WIDTH * OUTPUTS)  # tiles in FP8, by rows and by columns
    assert left(tape) == GRADIENT + RESULT * fp8 - 2 * fp8 * TILES_OF_RESULT
    assert tape.moments[-1].dense == 0


def test_a_product_outside_of_the_recipe():
    tape = tape_of(True, False)
    tape.product("input", GRADIENT, RESULT, WIDTH * OUTPUTS, in_recipe=False)
    assert max(each.bytes for each in tape.moments) == GRADIENT + RESULT


@pytest.mark.parametrize("deferred, most, leaves", [
    (False, 2 * RESULT + TILES_OF_RESULT, 2 * RESULT - 4 * TILES_OF_GRADIENT - INPUT[True]),
    (True, 2 * RESULT, 2 * RESULT - 2 * TILES_OF_GRADIENT)])
def test_products_that_get_tiles(deferred, most, leaves):
    """Gradients are there as tiles by rows and by columns; where weight gradients are made apart the latter stay."""
    tape = tape_of(True, deferred)
    tape.products_of_swiglu("input", 2, GRADIENT, RESULT, WIDTH * OUTPUTS)
    assert max(each.bytes for each in tape.moments) == GRADIENT + most
    assert left(tape) == GRADIENT + leaves
