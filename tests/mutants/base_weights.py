"""Mistakes of frozen weights that are kept in fewer bits: their products, shards, reading, memory and arguments."""

from mutant import of

STEP = ("tests/unit/training/test_lora_base.py",)
READING = ("tests/unit/checkpoint/test_quantised_base.py",)
LAYOUTS = ("tests/parallel/test_base_weights.py",)
MEMORY = ("tests/unit/planning/test_state_bytes.py",)
ARGUMENTS = ("tests/unit/arguments/test_quantised_arguments.py",)

BASE_WEIGHTS = of(
    STEP,
    ("freeze_base", "isinstance(module, Router) or not", "not"),
    ("_master_dtype", " if parameter.requires_grad", ""),
    ("is_quantised", " and not row.name.endswith(_PLAIN)", ""),
    ("FrozenWeight.expert", "slice(index, index + 1)", "slice(0, 1)"),
    ("frozen_weight._Multiply.backward", "by_weight(grad, weight.dense(grad.dtype))",
     "by_weight(grad, weight.dense(torch.bfloat16).to(grad.dtype))"),
    ("Fp8Form.weight", "partial(_transposed, *blocks)", "blocks"),
) + of(
    READING,
    ("job.base_weights._read", "source.dtypes[name] == torch.float8_e4m3fn", "False"),
    ("job.base_weights._chunks", "start // BLOCK * BLOCK, stop", "start, stop"),
    ("check_adapters", "if base.form != form:", "if False:"),
    ("job.base_weights._hash", "(*experts, first + row, held.columns.start)", "(*experts, row, held.columns.start)"),
) + of(
    LAYOUTS,
    ("model.base_weights._hold", "mesh.get_local_rank(axis) * shape.columns", "0"),
    ("_Rows.take", "rows[start - first:stop - first]", "rows[:stop - start]"),
    ("fill_held", "if counted:", "if True:"),
) + of(
    MEMORY,
    ("adapter_parts", "_MASTER * adapters.experts", "2 * adapters.experts"),
    ("_base_of_rows", "kept.router if row.name.endswith(ROUTER) else kept.element", "kept.element"),
    ("_bytes_of_row", "blocks + _OF_ROW if", "blocks if"),
) + of(
    ARGUMENTS,
    ("refuse_cut", "if columns != row.shape[-1] and columns % base.block:", "if False:"),
    ("_cuts_a_block", "of_rank.rows_of_scale == 1", "False"),
    ("base_settings", "args.double_quantization is not False", "True"),
)
