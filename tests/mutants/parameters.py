"""Mistakes of the table of parameters, and of what a checkpoint must match."""

from mutant import of

TABLE = ("tests/unit/model/architecture/test_parameters.py",)
START = ("tests/unit/runtime/test_decision.py",)

PARAMETERS = of(
    "model/architecture/parameters.py", TABLE,
    ("config.kv_lora_rank + config.qk_rope_head_dim, hidden, REPLICATED)",
     "config.kv_lora_rank + config.qk_rope_head_dim, hidden, ROWS)"),
    ('("gate_proj", "up_proj")),', '("up_proj", "gate_proj")),'),
    ("(expert, number * rows, 0)", "(expert, 0, 0)"),
    ("1 + config.num_nextn_predict_layers\n", "1\n"),
    ("dtype=FLOAT32, trained=False", "trained=False"),
    ("dtype=FLOAT32, trained=False", "dtype=FLOAT32"),
    ("config.num_experts_per_tok * rows * columns", "rows * columns"),
    ("(hidden, 2 * hidden)", "(hidden, hidden)"),
    ("for name, rows, _, _ in down:", "for name, rows, _, _ in up:"),
    ("if config.tie_word_embeddings:", "if False:"),
) + of(
    "model/architecture/placements.py", TABLE,
    ("Division(ETP, 1, matrices=2)", "Division(ETP, 1)"),
    ("Division(EP, 0), Division(ETP, 2)", "Division(EP, 0), Division(ETP, 1)"),
    ("raise ValueError", "print"),
) + of(
    "model/architecture/fields.py", START,
    ("default=10000.0, match=FORWARD,", "default=10000.0,"),
    ("default=None, match=FORWARD, rotary", "default=None, rotary"),
    ("default=1e-6, match=FORWARD", "default=1e-6"),
) + of(
    "runtime/decision.py", START,
    ("(not own and (", "(("),
    ("(*start.notes, *changed)", "start.notes"),
) + of(
    "checkpoint/loadable.py", START,
    ("if changed and not weights_alone", "if changed"),
)
