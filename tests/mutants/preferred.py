"""Mistakes in preference tuning. A table like table.py's."""

from mutant import of

LOSSES = ("tests/unit/finetuning/test_preference_losses.py",)
ROWS = ("tests/unit/finetuning/test_preference_rows.py",)
LAYOUTS = ("tests/parallel/test_preference_layouts.py",)
RUNS = ("tests/e2e/test_preference.py",)

PREFERRED = of(
    LOSSES,
    ("losses.ipo", "scores.ratios_P2 / scores.lengths_P2", "scores.ratios_P2"),
    ("losses.smoothed", "- smoothing * F.logsigmoid(-margin_P)", "- smoothing * F.logsigmoid(margin_P)"),
    ("losses.kto", "(ratios_N - divergence)", "ratios_N"),
    ("Pairs.contribution", "(counts[\"chosen_weight\"] or 1.0)", "(counts[\"samples\"] or 1.0)"),
    ("LabelledAnswers.contribution", "number = counts[\"good\" if side == \"chosen\" else \"bad\"] or 1.0",
     "number = samples"),
    ("Rewards.contribution", "margin_BP - asked_BP2[..., 0]", "margin_BP"),
    ("completion.divergence", "(ratios_BD * there_BD).sum()", "ratios_BD.sum()"),
    ("lora.adapters_off", "factor.zero_()", "factor.mul_(0.5)"),
    ("lora.adapters_off", "factor.copy_(values)", "pass"),
) + of(
    ROWS,
    ("Units.members", "self.order[members[there]]", "members[there]"),
    ("inputs.on_first_tokens", "(lengths_D.cumsum(0) - lengths_D)", "(lengths_D.cumsum(0) - 1)"),
    ("SumsFile._open", "whole = size == found.offset + found.nbytes", "whole = True"),
    ("PartMaker._keep", "if self.job.ends_are_read:", "if False:"),
    ("preferences.to_labelled", "conversation.last_user + 1", "0"),
) + of(
    LAYOUTS,
    ("Pairs.contribution", "rows.share(-scores.policy_P2[..., 0] * there_BP)",
     "(-scores.policy_P2[..., 0] * there_BP).sum()"),
    ("completion.divergence", "meshes.group(\"dp\")", "meshes.group(\"cp\")"),
    ("TensorParallel.whole_sequence", "JoinTokens.apply(x_BSH, SEQUENCE_DIM, self.group) if",
     "gather_sum(x_BSH, SEQUENCE_DIM, self.group) if"),
) + of(
    RUNS,
    ("reference.reference_sums", "        reference.load(trainer)", "        pass"),
    ("decision.decide", "new, dropped = [*new, SCORE], [*dropped, HEAD]", "new = [*new, SCORE]"),
)
