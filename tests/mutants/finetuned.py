"""Mistakes in what a fine-tuning trains on and reports. A table like table.py's."""

from mutant import of

STEP = ("tests/unit/finetuning/test_packed_training.py",)
OBJECTIVES = ("tests/unit/training/test_objectives.py",)
TRANSLATED = ("tests/unit/cli/test_translate_arguments.py",)
COMMAND_LINE = ("tests/unit/arguments/test_finetuning_arguments.py",)

FINE_TUNED = of(
    STEP,
    ("SampleMean.counts", "rows.per_document(rows.weights_BMS[:, depth])", "rows.per_row(rows.weights_BMS[:, depth])"),
    ("EmbeddingNoise.add_to", "first:first + length", ":length"),
    ("NoisySampler._noise", "torch.arange(len(documents_S)) - starts_D[documents_S]", "torch.arange(len(documents_S))"),
    ("NoisySampler._noise", ":neftune:{number // self.rows.rows_per_epoch}", ":neftune"),
    ("NoisySampler._noise", "bounds_D[len(samples)] = 0.0", "pass"),
    ("DeepseekStage.__init__", "wide = torch.promote_types(torch.get_default_dtype(), torch.float32)",
     "wide = torch.float32"),
    ("held_out.together", 'weights = [each.counts[f"weight_{depth}"] for each in losses]',
     "weights = [1.0 for each in losses]"),
) + of(
    OBJECTIVES,
    ("HeldOut.contribution", "likeliest_BS & (rows.weights_BS != 0)", "likeliest_BS"),
) + of(
    TRANSLATED,
    ("training.batches", "micro * steps * data_ranks", "micro * steps"),
    ("training.rate", 'more.pop("min_lr_rate", 0.0) * peak', 'more.pop("min_lr_rate", 0.0)'),
    ("training.optimizer", '"--adam-beta2", 0.999', '"--adam-beta2", 0.95'),
    ("translation._rest", "if str(value).lower() not in harmless:", "if not harmless:"),
    ("_adapter", 'r.number("lora_alpha", 2 * rank)', 'r.number("lora_alpha", rank)'),
) + of(
    COMMAND_LINE,
    ("FineTuningParser.parse_args", "if getattr(given, name) is None:", "if not getattr(given, name):"),
    ("_begins_from_weights", "load.resolve() != save.resolve()", "True"),
    ("timeline.last_iteration", "whole + partial", "whole"),
)
