"""Mistakes in how checkpoints of others are read. A table like table.py's."""

from mutant import of

CONVERTED = of(
    ("tests/unit/checkpoint/convert/test_convert_legacy.py",),
    ("joining._items", "[half * own[0] // halves, *", "[half * rows, *"),
    ("joining._items", "begin[axis] += rank * (local[axis] // halves)", "begin[axis] += rank * local[axis]"),
    ("joining._stages", "ranks * len(iteration.files[0].chunks)", "len(iteration.files[0].chunks)"),
    ("joining._stages", "file.pipeline != stage % ranks", "file.pipeline != stage // len(iteration.files[0].chunks)"),
    ("joining._part", "file.expert * local + number", "number"),
    ("transposed_experts", "run if row else 0", "0"),
    ("_grouped_items", "number * prod(size)", "0"),
    ("StackedSource.read", "part.T.contiguous()", "part.reshape(part.T.shape)"),
    ("torch_file._begin", "sum(lengths)", "0"),
    ("torch_file._known", "(module, name) in _CALLS", "module == \"torch.nn\""),
)
