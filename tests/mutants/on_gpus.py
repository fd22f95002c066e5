"""Mistakes in what is chosen and prepared for a GPU's kernels, which no run on a CPU reaches. Those in the kernels
themselves are in tests/emulation/mistakes.py.
"""

from mutant import of

SIDE_STREAM = ("tests/unit/ops/test_side_stream.py",)
STARTUP = ("tests/unit/ops/backends/test_startup.py",)
TABLES = ("tests/unit/ops/backends/test_operand_tables.py",)
TRACED = ("tests/gpu/test_kernels_traced.py",)

ON_GPUS = of(
    TABLES,
    ("starts_aligned", "x.storage_offset() * x.element_size() % 16 == 0", "x.data_ptr() % 16 == 0"),
    ("operands.table", "keep(rows_of, tuple(counts)", "keep(rows_of, tuple(sorted(counts))"),
    ("operands.table", "stream_number(like.device))", "0)"),
    ("operands.table", "_captured if is_capturing(like.device) else _kept", "_kept"),
    ("operands._kept", "if is_capturing(device):", "if False:"),
    ("tile_rows", "min(height, count - i)", "height"),
    ("tile_rows", "first += count", "first += -(-count // height) * height"),
) + of(
    TRACED,
    ("operands.table", "torch.compiler.is_compiling() or type(like) is not torch.Tensor", "False"),
) + of(
    STARTUP,
    ("_no_hopper", "_not_hopper() or _no_library()", "_no_library() or _not_hopper()"),
    ("_no_transformer_engine_gemm", "_not_hopper() or _no_transformer_engine()",
     "_no_transformer_engine() or _not_hopper()"),
    ("_no_library", "compute_capability() < OLDEST", "compute_capability() < (7, 0)"),
    ("startup._slow", "if choice.backend == REFERENCE]", "if choice.backend != REFERENCE]"),
) + of(
    SIDE_STREAM,
    ("RunOnSideStream.start", "_WaitInBackward.apply(x, self._side) if x.requires_grad else x", "x"),
)
