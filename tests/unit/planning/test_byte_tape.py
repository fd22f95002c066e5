"""Products on the tape of bytes, by hand: what ops/fp8/recipe.py and ops/lora.py make and free, and what waits for
weight gradients.
"""

import pytest

from megatron_deepseek.planning.byte_tape import Tape
from megatron_deepseek.planning.layer_shapes import Kept
from megatron_deepseek.planning.numbers import Numbers
from megatron_deepseek.planning.trained_weights import EXPERTS_UP, Trained

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
    tape = Tape([], [], deferred, Numbers(fp8=fp8), Trained(False))
    tape.make(GRADIENT)
    tape.product("experts' rows", GRADIENT, RESULT, WIDTH * OUTPUTS)
    assert max(each.bytes for each in tape.moments) == GRADIENT + fp8 * TILES_OF_GRADIENT + RESULT
    assert left(tape) == RESULT
    assert tape.moments[-1].dense == 0
    tape.products_of_swiglu("experts' rows", 1, RESULT, GRADIENT, WIDTH * OUTPUTS)  # FP8: tiles both ways
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


@pytest.mark.parametrize("drops, deferred, most, leaves", [
    (False, False, 3, 0),  # the gradients of weight and adapter, and their sum; the kept input is free
    (False, True, 4, 2),  # the gradient of the output waits beside that input
    (True, False, 5, 0),  # the first gradient, the input without features, and three times 64 bits for four of them
    (True, True, 7, 2)])  # gradients of output and inputs, that input, A's without features, and those bits
def test_an_adapter(drops, deferred, most, leaves):
    """In sizes of the input, as which the gradient of the output is as large."""
    kept = Kept("experts' rows", RESULT)
    trained = Trained(False, adapted=frozenset((EXPERTS_UP,)), drops=drops)
    tape = Tape([kept], [kept], deferred, Numbers(), trained)
    tape.make(RESULT)
    tape.product("experts' rows", RESULT, RESULT, 0)
    assert max(each.bytes for each in tape.moments) == most * RESULT
    assert left(tape) == leaves * RESULT
