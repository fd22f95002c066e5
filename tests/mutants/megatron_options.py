"""Mistakes in what options of Megatron-LM ask for: which data is evaluated, what is counted, compared and divided. A
table like table.py's.
"""

from mutant import of

VALIDATION = ("tests/unit/pretraining/test_validation.py",)
CURVES = ("tests/unit/runtime/test_megatron_logging.py",)
READING = ("tests/unit/data/test_pretraining_data.py",)
REPLICAS = ("tests/parallel/test_replicas.py",)
DIVISION = ("tests/unit/arguments/test_arguments.py",)
WIKITEXT = ("tests/unit/data/preprocess/test_wikitext_files.py",)

MEGATRON = of(
    VALIDATION,
    ("Sampler.every_sample", "weights_BS=batch.weights_BS * real_B1", "weights_BS=batch.weights_BS"),
    ("Sampler.every_sample", "consumed + global_batch_size > len(self.dataset)",
     "consumed + micro_batch_size > len(self.dataset)"),
    ("EverySample.__getitem__", '"right"', '"left"'),
    ("validation._mean", "loss * labels for loss, labels in losses", "loss for loss, labels in losses"),
    ("_plan_apart", "counts = [split.num_samples if settings.full_validation else num_samples for split in sources]",
     "counts = [num_samples for split in sources]"),
    ("validation_sets", "names[number] if names else number", "number"),
) + of(
    CURVES,
    ("StepCurves._timers", "self._times = zip(*self._times), []", "_ = zip(*self._times), []"),
    ("perplexity", "math.exp(min(20.0, loss))", "math.exp(loss)"),
    ("TensorBoard.curves", "self._consumed_samples, value", "iteration, value"),
) + of(
    READING,
    ("read_ahead", "current = reading.popleft()", "current = reading.pop()"),
    ("PackedSamples._order_of", "return order[1]", "return self._order[1]"),
) + of(
    REPLICAS,
    ("count_zeros", "if counts_in_norm(item)]", "if item.parameter.grad is not None]"),
    ("parameter_norm", "item.counted and is_first_copy(item.parameter)", "item.counted"),
    ("parameter_norm", "item.counted and is_first_copy(item.parameter)", "is_first_copy(item.parameter)"),
    ("replicas._digests", "yield (names[shard], offset), _digest(local)", "yield (names[shard], ()), _digest(local)"),
    ("replicas._digests", "gathered_parameters(unit)", "((shard, shard) for shard, _ in gathered_parameters(unit))"),
    ("describe_differences", "max(groups.values(), key=len)", "min(groups.values(), key=len)"),
) + of(
    DIVISION,
    ("Request._layers_of_stages", "parts[-1] -= bool", "parts[0] -= bool"),
    ("Request.split_parts", "self.model.num_hidden_layers + len(self.accounted.split())",
     "self.model.num_hidden_layers"),
) + of(
    WIKITEXT,
    ("_begins_article", "not previous.strip() and not following.strip() and ", ""),
    ("cut_sequences", "ids[:whole * length]", "ids[len(ids) - whole * length:]"),
    ("preprocess.assembly._cut", "settings.selection.seq_length + 1", "settings.selection.seq_length"),
)
