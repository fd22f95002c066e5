"""Mistakes of the released models: names, FP8 scales, chats, and what plans say of their attention."""

from mutant import of

FILES = ("tests/unit/model/architecture/test_released.py",)
SCALES = ("tests/unit/checkpoint/convert/test_convert.py", "tests/unit/checkpoint/job/test_repeated_export.py")
CHATS = ("tests/unit/finetuning/test_distilled_templates.py",)
KEPT = ("tests/unit/planning/test_activations.py", "tests/parallel/test_planned_memory.py")

RELEASED = of(
    FILES,
    ("families.name_of", "if other is not None and _OTHER_NAMES[other] == family.model_type else",
     "if other is not None else"),
    ("ModelConfig.to_hf_dict", ' | {"model_type": self.model_type}', ""),
) + of(
    SCALES,
    ("block_fp8.quantize", "power_of_two=scale_format == UE8M0", "power_of_two=False"),
    ("Scales.made", "self.wanted == self.given or ", ""),
    ("Scales.of", "return cls(asked or given, given)", 'return cls(asked or "float32", given)'),
    ("assets._with_scale_format", "if scale_format == block_fp8.UE8M0 else", "if True else"),
    ("HuggingFaceSource.read_fp8", "if self.powers_of_two:", "if False:"),
    ("job.export._dtype", 'run.save_hf_dtype or ("bf16"', '("bf16"'),
) + of(
    CHATS,
    ("choose_template", '"deepseek-v3" if not thinks else None', '"deepseek-v3" if thinks else None'),
) + of(
    KEPT,
    ("grouped_query_attention", "numbers.cuda else shapes.kv_heads", "numbers.cuda else shapes.kv_product_heads"),
    ("attention_output", "computed if viewed else width", "width"),
    ("norms_of_heads", "(shapes.heads + shapes.kv_product_heads) * size", "shapes.heads * size"),
    ("attention_products", "shapes.kv_product_heads * model.head_dim", "model.head_dim"),
    ("travelling_width", "2 * kv_heads * model.head_dim", "kv_heads * model.head_dim"),
    ("layer_bytes._representative", "model.is_moe_layer(index), model.window_of(index)",
     "model.is_moe_layer(index), model.window_of(0)"),
)
