"""Mistakes in how models are loaded, share ranks and are asked. A table like table.py's."""

from mutant import of

LOADED = of(
    ("tests/unit/inference/test_loading.py",),
    ("held_loading._read_fp8", "own_scales[part.row:part.row + len(q)]", "own_scales[part.start:part.start + len(q)]"),
    ("peft_files._of_pattern", "return patterns.number(pattern)", "break"),
    ("build.shape_whole", "module.to(wide)", "pass"),
    ("model_files._sampling", 'known["temperature"] = 0.0', "pass"),
) + of(
    ("tests/unit/ops/test_nf4.py",),
    ("nf4.quantize", "codes[..., 0::2] << 4 | codes[..., 1::2]", "codes[..., 1::2] << 4 | codes[..., 0::2]"),
    ("nf4.quantize", "blocks * scales.clamp(min=_SMALLEST).reciprocal_()", "blocks / scales.clamp(min=_SMALLEST)"),
    ("quantize_scales", "scales.double().mean(-1, keepdim=True)", "scales.double().mean()"),
) + of(
    ("tests/parallel/test_answers.py",),
    ("held_loading._read_fp8", "[skipped:skipped + len(q)]", "[:len(q)]"),
    ("Replicas.add", "replace(parameters, seed=seed)", "parameters"),
) + of(
    ("tests/unit/training/test_objectives.py",),
    ("Validation.contribution", "rows.later(main_BS, depth)", "rows.later(main_BS, depth - 1)"),
    ("Validation.contribution", " & (rows.weights_BMS[:, depth] != 0)", ""),
) + of(
    ("tests/unit/cli/test_chat.py",),
    ("ChatSession._answer", "self.replicas.abort(name)", "pass"),
) + of(
    ("tests/e2e/test_generate.py",),
    ("cut_and_read", "os.truncate(path, whole)", "pass"),
    ("PromptReader._parameters", "(self.parameters.seed or 0) + number", "(self.parameters.seed or 0)"),
)
