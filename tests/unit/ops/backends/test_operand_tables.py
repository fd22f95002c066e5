"""What kernels demand of their arguments: alignment, and tables of groups' tiles: what they say, that one that is kept
is given for its own counts, device and stream, and how long it is kept.
"""

import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode

from megatron_deepseek.ops.backends.cuda import operands
from megatron_deepseek.ops.backends.cuda.operands import table, tile_rows
from megatron_deepseek.ops.backends.kernels import starts_aligned

CPU, META = torch.empty(1), torch.empty(1, device="meta")


def two(counts) -> list[tuple[int, int, int]]:
    return tile_rows(counts, 2)


def test_every_group_starts_a_tile():
    """By hand: group, first row, rows."""
    assert two([3, 0, 2]) == [(0, 0, 2), (0, 2, 1), (2, 3, 2)]
    assert tile_rows([130, 128]) == [(0, 0, 128), (0, 128, 2), (1, 130, 128)]


def test_a_table_is_made_once():
    first = table(two, [3, 0, 2], CPU)
    assert first.tolist() == [[0, 0, 2], [0, 2, 1], [2, 3, 2]] and first.dtype == torch.int32
    assert table(two, (3, 0, 2), torch.empty(7)) is first


@pytest.mark.parametrize("counts", [[2, 0, 3], [3, 2], [5, 0, 0], [0, 3, 2]])
def test_other_counts_of_as_many_rows_have_their_own(counts):
    table(two, [3, 0, 2], CPU)
    assert table(two, counts, CPU).tolist() == list(map(list, two(counts)))


def test_another_form_of_the_same_counts_has_its_own():
    table(two, [3, 0, 2], CPU)
    assert table(tile_rows, [3, 0, 2], CPU).tolist() == [[0, 0, 3], [2, 3, 2]]


def test_no_rows():
    assert table(two, [0, 0], CPU).shape == (0, 0)


def test_another_device_and_another_stream_have_their_own(monkeypatch):
    """No other stream waits for the copy of a table, or may read it after it was dropped."""
    first = table(two, [1, 2], CPU)
    assert table(two, [1, 2], META).device == META.device
    monkeypatch.setattr(operands, "stream_number", lambda device: 7)
    second = table(two, [1, 2], CPU)
    assert second is not first and second.tolist() == first.tolist()
    monkeypatch.undo()
    assert table(two, [1, 2], CPU) is first


def is_kept_while_others_come(counts: list[int]) -> bool:
    """Return whether the table of `counts` is still the same after more others than are kept."""
    first = weakref.ref(table(two, counts, CPU))
    for rows in range(600):
        table(two, [rows, *counts], CPU)
    return first() is not None


def test_tables_that_a_graph_reads_are_never_dropped(monkeypatch):
    """A captured graph has their addresses, and reads there whatever came after them."""
    assert not is_kept_while_others_come([4, 5])
    table(two, [6, 5], CPU)
    with monkeypatch.context() as capture:
        capture.setattr(operands, "is_capturing", lambda device: True)
        table(two, [6, 5], CPU)
    assert is_kept_while_others_come([6, 5])


def test_a_graph_of_counts_that_no_step_had_is_refused(monkeypatch):
    """The copy from the host would be captured too, and read its memory at each replay."""
    monkeypatch.setattr(operands, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"\[7, 5\] rows in its groups.*run the step once before"):
        table(two, [7, 5], CPU)


@pytest.mark.filterwarnings("error")
def test_alignment_is_known_without_data():
    """A FakeTensor has no address: torch warns of whoever asks for it, or raises an error."""
    with FakeTensorMode():
        x = torch.empty(64, dtype=torch.bfloat16)
        assert starts_aligned(x) and starts_aligned(x[8:]) and not starts_aligned(x[1:])
