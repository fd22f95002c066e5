"""Mistakes in grouped-query attention, its sliding windows, its families' files and their conversion."""

from mutant import of

LAYOUTS = ("tests/parallel/test_layouts.py",)
LAYER = ("tests/unit/model/attention/test_gqa.py", "tests/unit/model/test_family_parity.py", *LAYOUTS)
WINDOW = ("tests/unit/parallel/test_window_mask.py", *LAYER)
CONFIG = ("tests/unit/model/architecture/test_family_config.py", "tests/unit/model/architecture/test_parameters.py")
FILES = ("tests/unit/checkpoint/convert/test_convert_family.py",)

GROUPED_QUERY = of(
    LAYOUTS,
    ("PieceLinear.__init__", "(Replicate(), Partial())", "(Replicate(), Replicate())"),
    ("PieceLinear.__init__", "tp.rank * pieces // tp.size * width", "0"),
    ("PieceLinear.__init__", "tp.rank * pieces // tp.size * width", "tp.rank % pieces * width"),
    ("GroupedQueryAttention.__init__", ", weight_grad=Partial())", ")"),
    ("ParallelLinear.__init__", "else weight_grad\n", "else tp.activation_grad\n"),
    ("ProjectedHeads.block", "for x in self.keys_and_values(x_BSH)]",
     "for x in reversed(self.keys_and_values(x_BSH))]"),
) + of(
    LAYER,
    ("_turn_halves", "addcmul_(second, sin, value=-1)", "addcmul_(second, sin)"),
    ("_turn_halves", "out[..., 2 * half:] = rest", "out[..., 2 * half:] = 0"),
    ("_RotateHalves.backward", "-sin_SD", "sin_SD"),
    ("plain_backward", "x.unflatten(1, (heads, -1)).sum(2)", "x.unflatten(1, (-1, heads)).sum(1)"),
    ("_llama3_frequencies", ".clamp(0, 1)", ""),
    ("_llama3_frequencies", "(1 - kept) * plain / scaling.factor", "(1 - kept) * plain"),
    ("_temperature", "return scaling.attention_factor", "return 1.0"),
    ("softmax_scale", "not config.grouped_query and ", ""),
    ("ArchitectureFields.window_of", "index < len(self.layer_types) and ", "index and "),
) + of(
    WINDOW,
    ("window_mask.band", "keys.start + window, first", "keys.start + window - 1, first"),
    ("window_mask.lower_triangle", "max(earlier.stop, keys.start)", "keys.start"),
    ("window_mask.upper_triangle", "range(1 - keys.stop, 1 - keys.start))", "range(-keys.stop, -keys.start))"),
    ("VisibleBlock.read", "x.flip(2) if", "x if"),
    ("WindowMask._pieces", "(2 * self.blocks.size - 1 - rank) * chunk", "(self.blocks.size + rank) * chunk"),
    ("WindowAttention.__call__", "mask.documents)", "None)"),
) + of(
    CONFIG,
    ("key_value_rows", "pieces=heads", "pieces=None"),
    ("Division.parts", "ranks % self.pieces == 0", "True"),
    ("_grouped_query_attention", '("k", kv_rows, of_kv)', '("k", kv_rows, ROWS)'),
    ("_grouped_query_attention", "if config.attention_bias or config.qkv_bias:", "if config.attention_bias:"),
    ("hf_config._heads", "size or hidden // heads", "hidden // heads"),
    ("hf_window.read_window", "index < first", "index <= first"),
    ("hf_rope._grouped_query_scaling", "return found if together else found | _NO_MSCALES", "return found"),
    ("hf_keys._refuse_foreign", "not in (value, None)", "not in (value, None, True)"),
    ("_grouped_query", "base.num_attention_heads)", "base.num_attention_heads) // 2"),
) + of(
    FILES,
    ("_within_qkv", '"v_proj": (size, queries + size)', '"v_proj": (size, queries)'),
    ("_within_qkv", "config.num_attention_heads // groups * size", "config.num_attention_heads * size"),
    ("Place.regions", "number * self.step", "number * run"),
    ("Place.rows_of", "start += number * self.run", "start += number"),
    ("megatron._stacked", "offset=(layer, *place.offset)", "offset=(0, *place.offset)"),
    ("megatron_places", "not config.n_routed_experts if stored is None", "False if stored is None"),
)
