"""benchmarks/step_anatomy.py: what operators move, a few parts of a small step by hand, and the tables of its page."""

import sys
from pathlib import Path

import pytest
import torch
from small_models import V3_SMALL
from torch_versions import VERSION

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))

import step_anatomy
from anatomy_pieces import least, parts
from anatomy_pieces.counting import BACKWARD, FORWARD, Count, StepCounter

LENGTH = 8
FLOAT, INDEX = 4, 8


def test_what_operators_move():
    """In float32: a product of [2, 3] and [3, 4], a view, a copy, rows taken, a number taken off all, one in place."""
    a, b, rows = torch.zeros(2, 3), torch.zeros(3, 4), torch.tensor([0, 0])
    expected = []
    with StepCounter("sums") as counter:
        for part, operation, size in (
                ("product", lambda: a @ b, (6 + 12 + 8) * FLOAT), ("view", lambda: a.t().reshape(3, 2).t(), 0),
                ("copy", lambda: torch.empty(2, 3).copy_(a), 12 * FLOAT),
                ("rows", lambda: b.index_select(0, rows), 2 * INDEX + 16 * FLOAT),
                ("row", lambda: a.sub(torch.zeros(1).expand(3)), 0), ("in place", lambda: a.mul_(2), 12 * FLOAT)):
            with counter.part(part):
                operation()
            expected.append((part, size))
    seen = {part: counter.counts.get((part, FORWARD), Count()).bytes for part, _ in expected}
    assert seen == dict(expected) | {"row": (1 + 1 + 6 + 6) * FLOAT}  # made of zeros, and read once though it is wide


def test_a_backward_belongs_to_the_part_of_its_forward():
    """x [2, 3] times W [3, 4], then a sum: the product's gradients, of which x needs none."""
    x, w = torch.ones(2, 3), torch.ones(3, 4, requires_grad=True)
    counter = StepCounter("sums")
    with counter:
        with counter.part("product"):
            y = x @ w
        with counter.part("sum"):
            total = y.sum()
        with counter.between_nodes("between"):
            total.backward()
    assert counter.counts["product", BACKWARD].bytes == (6 + 8 + 12) * FLOAT - 7 * FLOAT  # the 8 are one, expanded
    assert counter.counts["sum", FORWARD].bytes == (8 + 1) * FLOAT and ("sum", BACKWARD) not in counter.counts


def test_parts_of_a_small_step(meshes):
    """One micro-batch of 8 tokens in float32. Embedding: ids, and rows read and written. AdamW: seven numbers of 4
    bytes for each parameter. The copies of the tokens of one MoE layer to their 3 experts: rows read and written, and
    an index.
    """
    counter, parameters = step_anatomy.count_step(V3_SMALL, False, 1, LENGTH)
    needed = step_anatomy.least_bytes(V3_SMALL, False, 1, parameters, LENGTH)
    hidden = V3_SMALL.hidden_size
    assert counter.counts[parts.EMBEDDING, FORWARD].bytes == needed[parts.EMBEDDING, FORWARD] == (
        LENGTH * INDEX + 2 * LENGTH * hidden * FLOAT)
    assert needed[parts.ADAM, FORWARD] == 7 * FLOAT * parameters <= counter.counts[parts.ADAM, FORWARD].bytes
    assert needed[parts.DISPATCH, FORWARD] == (LENGTH + 3 * LENGTH) * hidden * FLOAT + 3 * LENGTH * INDEX
    assert all(counter.counts[place].bytes >= 0.99 * size for place, size in needed.items() if size)


def test_a_product_by_hand():
    """5 rows of 3 numbers to 2 in bfloat16 by two matrices; the backward reads y's gradient, x, W and writes both."""
    x, y, w = 15, 10, 2 * 6
    assert least.product(5, 3, 2, 2, 2) == (2 * (x + y + w), 2 * (y + x + w + x + w))


def test_the_table_has_a_row_for_each_part(meshes):
    counter, parameters = step_anatomy.count_step(V3_SMALL, True, 2, LENGTH)
    lines = [*step_anatomy.rows(counter, step_anatomy.least_bytes(V3_SMALL, True, 2, parameters, LENGTH))]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        *least.OF_MICRO_BATCH, *least.OF_STEP, "all else", "together"]
    assert {line.count("|") for line in lines} == {10}


@pytest.mark.slow
@pytest.mark.skipif(VERSION != (2, 13), reason="docs/benchmarks.md has the operators of torch 2.13")
def test_the_page_has_the_table_of_float32(meshes):
    """The operators to the last one, and bytes to what few tokens make that another processor sends to other experts.
    In bfloat16 numbers of rows are rounded up, and few processors have products of it.
    """
    counter, parameters = step_anatomy.count_step(step_anatomy.MODEL, False, 2)
    counted = [*step_anatomy.rows(counter, step_anatomy.least_bytes(step_anatomy.MODEL, False, 2, parameters))]
    section = (REPOSITORY / "docs" / "benchmarks.md").read_text().partition("Float32, by the same command")[2]
    written = [line for line in section.splitlines() if line.startswith("|")][:len(counted)]
    for line, expected in zip(written, counted, strict=True):
        cells, wanted = ([cell.strip().replace(",", "") for cell in each.split("|")] for each in (line, expected))
        assert [cells[index] for index in (1, 2, 4, 6, 8)] == [wanted[index] for index in (1, 2, 4, 6, 8)]
        for index in (3, 7) if counted.index(expected) > 1 else ():
            assert float(cells[index] or 0) == pytest.approx(float(wanted[index] or 0), rel=0.02, abs=0.1), expected
