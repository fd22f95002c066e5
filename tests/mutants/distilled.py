"""Mistakes in distillation. A table like table.py's."""

from mutant import of

LOSSES = ("tests/unit/finetuning/test_distillation_losses.py",)
CACHE = ("tests/unit/finetuning/test_distillation_cache.py",)
DIVIDED = ("tests/parallel/test_vocabulary_divergence.py",)
LAYOUTS = ("tests/parallel/test_distillation_layouts.py",)
RUNS = ("tests/e2e/test_distillation.py",)

DISTILLED = of(
    LOSSES,
    ("ForwardKL.terms", "log_q.exp()", "log_p.exp()"),
    ("ReverseKL.slopes", "self.terms(log_p, log_q)", "log_p.exp() * log_p"),
    ("JensenShannon.slopes", "(1 - self.beta) * log_p", "log_p"),
    ("JensenShannon._log_mixture", "math.log1p(-self.beta)", "math.log(self.beta)"),
    ("_Divergence.backward", "value=-1)", "value=0)"),
    ("VocabularyLogits.at_temperature", "self.wide_Tv / temperature", "self.wide_Tv * temperature"),
    ("VocabularyLogits.log_probabilities_of_all", ".clamp_(min=_NEVER)", ""),
    ("losses.divergence_of_top", "divergence.terms(log_p_TK, ", "divergence.terms(log_p_TK.detach(), "),
    ("Distillation.main", "_weighted(1 - self.settings.kd_ratio, lm_loss)", "lm_loss"),
    ("Distillation._with_live", "each.of_first(self.head.num_ids)", "each"),
    ("Distillation._with_live", ".at_temperature(self.settings.kd_temperature)", ""),
    ("Distillation._with_cached", "logits.of_first(self.num_ids)", "logits"),
    ("DistillationSettings.factor", "self.kd_temperature**2", "self.kd_temperature"),
    ("NextToken.contribution", "range(1, 1 + predictions.num_depths)", "range(1, 1)"),
) + of(
    CACHE,
    ("LossWeights.labels", " - (first & (self.counts > 0))", ""),
    ("CachedSampler._of_row", "torch.nonzero(weights_S).squeeze(-1)", "torch.arange(int((weights_S != 0).sum()))"),
    ("CachedDataset.keep", "np.maximum(log_rest, _LOWEST)", "log_rest"),
    ("CachedDataset._mapped", "size == found.offset + found.nbytes and", ""),
    ("same_tokens.refuse_other_vocabulary", "elif teacher_size != student_size:", "elif False:"),
    ("same_tokens.first_difference", "if there.get(number) != here.get(number))", "if number not in here)"),
) + of(
    DIVIDED,
    ("_Divergence.forward", "sums_2T if tp.size == 1 else all_reduce(sums_2T, tp.group)", "sums_2T"),
    ("VocabularyLogits.of_first", "number - self.tp.rank * self.local_Tv.shape[-1]", "number"),
    ("VocabularyLogits.top", "ids_TK + self.tp.rank * self.local_Tv.shape[-1]", "ids_TK"),
    ("VocabularyLogits.log_rest", "local_TK.where(mine_TK, columns)", "local_TK"),
    ("teacher.head_rows", "whole_VH[tp.rank * columns:(tp.rank + 1) * columns]", "whole_VH[:columns]"),
) + of(
    LAYOUTS,
    ("LiveTeacher._states", "predictions.head.inputs(predictions.states[0])", "predictions.states[0]"),
    ("Trainer.read_at_head", "whole_sequences(torch.cat(objective.kept), self.meshes)", "torch.cat(objective.kept)"),
) + of(
    RUNS,
    ("LogitCache._likeliest", ".at_temperature(made.kd_temperature)", ""),
    ("LogitCache._starts_left", "if not all(", "if all("),
    ("CachedDataset.finish", "self.done[samples] = True", "pass"),
    ("task.check_cache", "if made.kd_temperature != asked.kd_temperature:", "if False:"),
    ("task.check_distillation", "if missing == each.num_samples:", "if False:"),
    ("teacher.check_teacher", "if problem is not None:", "if False:"),
)
