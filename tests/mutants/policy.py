"""Mistakes in the losses of reinforcement learning and in the rows of samples. A table like table.py's."""

from mutant import of

ADVANTAGES = ("tests/unit/rl/test_advantages.py",)
LOSSES = ("tests/unit/rl/test_policy_losses.py",)
OBJECTIVE = ("tests/unit/rl/test_policy_objective.py",)
ROWS = ("tests/unit/rl/test_sample_rows.py",)
HEAD = ("tests/unit/model/test_head.py",)
LAYOUTS = ("tests/parallel/test_policy_layouts.py",)

POLICY = of(
    ADVANTAGES,
    ("advantages._divisor", 'correction=1 if settings.advantage == "sample-std" else 0', "correction=1"),
    ("group_advantages", "if len(known) < 2 or own.min() == own.max():", "if len(known) < 2:"),
    ("group_advantages", "if not rewards_N[number].isnan()]", "]"),
) + of(
    LOSSES,
    ("losses.policy_terms", "torch.minimum(ratio * advantages", "torch.maximum(ratio * advantages"),
    ("losses.policy_terms", ".where(advantages < 0, worse)", ""),
    ("losses.policy_terms", "clipped.detach()", "clipped"),
    ("losses.policy_terms", "tokens.policy.where(tokens.weights != 0, 0)", "tokens.policy"),
    ("losses.divergence_terms", "terms * tokens.log_ratio.exp()", "terms * tokens.log_ratio.exp().detach()"),
    ("losses.k3", "torch.expm1(x) - x", "x.exp() - x - 1"),
    ("losses.divergence_terms", "tokens.difference(tokens.reference, tokens.policy)",
     "tokens.difference(tokens.policy, tokens.reference)"),
    ("losses.token_losses", "* kept * correction", "* kept"),
    ("losses.token_losses", "tokens.sample_mean(tokens.log_ratio)", "tokens.sample_sum(tokens.log_ratio)"),
    ("losses.close_enough", "(tokens.advantages >= 0) | ", ""),
    ("losses.close_enough", "tokens.difference(tokens.behaviour", "tokens.difference(tokens.old"),
    ("losses.correction_weights", 'if level == "sequence" else difference', 'if level == "" else difference'),
    ("losses.correction_weights", "weights.where(weights <= threshold, 0)", "weights.clamp(max=threshold)"),
    ("losses.correction_weights", "tokens.difference(tokens.old, tokens.rollout)",
     "tokens.difference(tokens.rollout, tokens.old)"),
    ("losses.shares", "tokens.weights / (tokens.lengths * samples_or_one)", "tokens.weights / tokens_or_one"),
    ("losses.shares", "(settings.loss_constant * samples_or_one)", "settings.loss_constant"),
    ("SampledTokens.difference", ".where(self.weights != 0, 0)", ""),
    ("losses.grpo_loss", "(weights_NT.sum(-1) > 0).sum()", "len(weights_NT)"),
) + of(
    OBJECTIVE,
    ("GroupRelative.tokens", "given.get(OLD, found_BS.detach())", "found_BS.detach()"),
    ("GroupRelative.tokens", "temperature=self.settings.temperature,", ""),
    ("GroupRelative.tokens", "kept_BSM=rows.inputs.get(KEPT_IDS)", "kept_BSM=None"),
    ("GroupRelative.distribution", "self.settings.temperature", "1.0"),
    ("GroupRelative.contribution", "(counts[\"samples\"] or 1.0)", "(counts[\"tokens\"] or 1.0)"),
    ("objective.measures", "(ratio < 1 - settings.clip_low) & ((advantages < 0) | any_sign)",
     "ratio < 1 - settings.clip_low"),
    ("objective.measures", "k3(mismatch)", "k3(-mismatch)"),
    ("objective.measures", "k3(tokens.log_ratio)", "k3(-tokens.log_ratio)"),
) + of(
    ROWS,
    ("rl.rows._places", "end - len(samples[number].tokens), end", "begin, begin + len(samples[number].tokens)"),
    ("rl.rows._rank_at", "rank if turn % 2 == 0 else dp - 1 - rank", "rank"),
    ("rows_of_rank", "shape.rows_each(len(rows)) - len(own)", "0"),
    ("RowShape.rows_each", "self.pp > 1 and not takes_microbatches(self.schedule, self.pp, microbatches)", "False"),
    ("rl.rows._replayed", "end - len(of_tokens_TLK):end] = of_tokens_TLK", "end - len(of_tokens_TLK) + 1:end] = "
     "of_tokens_TLK[:-1]"),
    ("rl.rows._ids_and_weights", "sample.finished or not masks_unfinished", "True"),
) + of(
    HEAD,
    ("VocabularyLogits.log_probabilities_among", ".masked_fill(~there_TM, -torch.inf)", ""),
    ("VocabularyLogits.log_probabilities_among", ".where(there_TM.any(-1), self.log_normalizer_T)", ""),
    ("VocabularyLogits.at_temperature", "self.wide_Tv / temperature", "self.wide_Tv * temperature"),
) + of(
    LAYOUTS,
    ("VocabularyLogits._logits_of", "sum_alike(own_TK, self.tp.group)", "own_TK"),
    ("SequenceSums.of_documents", "self._own_places(x_BD.device)", "self._own_places(x_BD.device) * 0"),
    ("GroupRelative.counts", "(rows.per_document(weights_BS) > 0).sum()", "rows.per_document(weights_BS).numel()"),
) + of(
    ("tests/unit/training/test_trainer.py",),
    ("division.divide", "batch.real_BS.any(1).sum()", "batch.num_rows"),
    ("_filled_sequences", "(tokens_B > 0).sum()", "len(tokens_B)"),
)
