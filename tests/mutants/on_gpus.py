"""Mistakes in what is chosen and prepared for a GPU's kernels, which no run on a CPU reaches. Those in the kernels
themselves are in tests/emulation/mistakes.py.
"""

from mutant import of

REFERENCES = ("tests/unit/ops/backends/test_references.py",)
SIDE_STREAM = ("tests/unit/ops/test_side_stream.py",)
STARTUP = ("tests/unit/ops/backends/test_startup.py",)
FORMS = ("tests/gpu/test_kernels_forms.py",)
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
    FORMS,
    ("cuda.gemm.grouped_scaled_mm", "_tall_tiles if tall else tile_rows", "tile_rows if tall else _tall_tiles"),
    ("worth_tall_tiles", "2 * short >= 3 * tall", "3 * short >= 2 * tall"),
    ("_fits_gemm", "a_q.shape[1] > 0 and ", ""),
    ("cuda.gemm._depths", "sum(tiles[:i])", "sum(tiles[:i + 1])"),
    ("_padded_columns", "(0, -part.shape[1] % TILE)", "(-part.shape[1] % TILE, 0)"),
    ("cuda.quantize._gate_and_up", "rows if rows[0].stride(0) == rows[1].stride(0) else [dense(x) for x in rows]",
     "rows"),
    ("cuda.quantize.swiglu_backward_tiles", "not joint and gate.shape[-1] % TILE", "False"),
    ("cuda.layers.rope_queries", "nope % 8 or ", ""),
    ("cuda.layers._gather", " or x.requires_grad and x.dtype != _BF16", ""),
    ("cuda.layers._gather", "if isinstance(x, BlockScaled):", "if False:"),
    ("_GatherTiles.forward", "order_R if copies == 1 else order_R // copies", "order_R"),
    ("_GatherTiles.backward", "gather_again(part, inverse_R)", "gather_again(part, inverse_R.argsort())"),
    ("cuda.layers.sort_by_expert", "num_experts > 1024", "num_experts > 2048"),
    ("cuda.layers.cross_entropy_gradient", "torch.autograd.graph.increment_version(logits_Tv)", "pass"),
) + of(
    REFERENCES,
    ("BlockScaled.__torch_dispatch__", "part.index_select(0, args[2])", "gather_rows(part, args[2])"),
) + of(
    STARTUP,
    ("_is_as_declared", "not hasattr(getattr(torch.ops, NAMESPACE), name)", "False"),
    ("_is_as_declared", "not declared or ", "True or "),
    ("_no_hopper", "_not_hopper() or _no_library()", "_no_library() or _not_hopper()"),
    ("_no_transformer_engine_gemm", "_not_hopper() or _no_transformer_engine()",
     "_no_transformer_engine() or _not_hopper()"),
    ("_no_library", "compute_capability() < OLDEST", "compute_capability() < (7, 0)"),
    ("startup._slow", "if choice.backend == REFERENCE]", "if choice.backend != REFERENCE]"),
) + of(
    SIDE_STREAM,
    ("RunOnSideStream.start", "_WaitInBackward.apply(x, self._side) if x.requires_grad else x", "x"),
)
