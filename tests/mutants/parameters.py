"""Mistakes of the table of parameters, and of what a checkpoint must match."""

from mutant import of

TABLE = ("tests/unit/model/architecture/test_parameters.py",)
START = ("tests/unit/runtime/test_decision.py",)

PARAMETERS = of(
    TABLE,
    ("_latent_attention",
     "config.kv_lora_rank + config.qk_rope_head_dim, hidden, REPLICATED)",
     "config.kv_lora_rank + config.qk_rope_head_dim, hidden, ROWS)"),
    ("parameters._experts", '("gate_proj", "up_proj")),', '("up_proj", "gate_proj")),'),
    ("Parameter.hf_tensors", "(expert, number * rows, 0)", "(expert, 0, 0)"),
    ("outer_rows", "1 + config.num_nextn_predict_layers\n", "1\n"),
    ("parameters._experts", "dtype=FLOAT32, trained=False", "trained=False"),
    ("parameters._experts", "dtype=FLOAT32, trained=False", "dtype=FLOAT32"),
    ("parameters._experts", "config.num_experts_per_tok * rows * columns", "rows * columns"),
    ("parameters._norms", "(hidden, 2 * hidden)", "(hidden, hidden)"),
    ("_latent_attention", "for name, rows, _, _ in down:", "for name, rows, _, _ in up:"),
    ("outer_rows", "if config.tie_word_embeddings:", "if False:"),
) + of(
    TABLE,
    ("EXPERT_ROWS", "Division(ETP, 1, matrices=2)", "Division(ETP, 1)"),
    ("EXPERT_COLUMNS", "Division(EP, 0), Division(ETP, 2)", "Division(EP, 0), Division(ETP, 1)"),
    ("Placement.local_shape", 'raise ValueError(f"dimension', 'print(f"dimension'),
) + of(
    START,
    ("ArchitectureFields.rope_theta", "default=10000.0, match=FORWARD,", "default=10000.0,"),
    ("ArchitectureFields.rope_scaling", "default=None, match=FORWARD, rotary", "default=None, rotary"),
    ("ArchitectureFields.rms_norm_eps", "default=1e-6, match=FORWARD", "default=1e-6"),
) + of(
    START,
    ("decision.decide", "(not own and (", "(("),
    ("decision.decide", "(*start.notes, *lines)", "start.notes"),
) + of(
    START,
    ("check_directory", "if changed and not weights_alone", "if changed"),
)
