"""Mistakes in evaluation, in what the engine reads of prompts for it, and in the sandbox. A table like table.py's."""

from mutant import of

EVALUATED = of(
    ("tests/unit/inference/test_prompts_read.py",),
    ("Scheduler._admit", "rest and rest[0] in computed_now", "not self"),
    ("Scheduler._shared_blocks", "min(most, sequence.request.prompt_reading.place)", "most"),
    ("Engine.check", "-1 if parameters.max_tokens else 1", "-1"),
    ("Engine._sequence", "request.prompt[:-1] or request.prompt", "request.prompt"),
) + of(
    ("tests/unit/evaluation/test_windows.py",),
    ("rolling_windows", "max(0, end - max_length)", "max(0, end - max_length + 1)"),
    ("rolling_windows", "stride if predicted else max_length", "stride"),
    ("cut_to", "excess >= len(question.context)", "excess > len(question.context)"),
) + of(
    ("tests/unit/evaluation/test_engine_model.py",),
    ("engine_model._answer", "value >= max(top.values())", "value"),
    ("engine_model._answer", "len(output.prompt) - len(question.text)", "len(question.context)"),
    ("Replicas.add", "self._waiting[beside].replica", "self._least_busy()"),
    ("answer_all", "last if request.follows and last in keys else None", "None"),
) + of(
    ("tests/unit/evaluation/test_kept_answers.py",),
    ("read_answers", "os.truncate(path, whole)", "pass"),
    ("questions.digest_of", "asdict(question), model]", "asdict(question)]"),
    ("ResumedModel.answers", "seen[name] += 1", "pass"),
) + of(
    ("tests/unit/evaluation/test_pass_at_k.py",),
    ("pass_at_k.pass_at_k", "comb(samples - passed, k)", "comb(samples - passed, 1)"),
    ("pass_at_k.complete", "number * parameters.n", "number"),
) + of(
    ("tests/unit/evaluation/test_perplexity.py",),
    ("perplexity_of", "document.tokens[:1] == (prefix,)", "not prefix"),
) + of(
    ("tests/unit/sandbox/test_sandbox.py",),
    ("sandbox.run._run", "code == 0 and marks.endswith(ENDED)", "code == 0"),
    ("enter_namespaces", " | _NEW_NETWORK", ""),
    ("close_files", "_ATTR_READ_ONLY, 0", "0, 0"),
    ("inside.limit", 'resource.RLIMIT_AS: settings["memory_bytes"], ', ""),
    ("inside.limit", ' resource.RLIMIT_NPROC: settings["processes"],', ""),
) + of(
    ("tests/unit/training/test_rows_read.py",),
    ("score_rows", "rows[number][1:]", "rows[number][:-1]"),
    ("continue_rows", "len(row) - 1]", "len(row) - 2]"),
    ("Distribution.log_probabilities_and_likeliest", "== predictions.labels_BMS", ">= predictions.labels_BMS"),
) + of(
    ("tests/unit/evaluation/test_trained_model.py",),
    ("trained_model._score", "values[-of_text:]", "values"),
) + of(
    ("tests/parallel/test_reading_rows.py",),
    ("TrainedModel._ends", "tokens[-1] == self.tokenizer.eod", "True"),
)
