"""Mistakes in kept routing and in what the engine says of a rollout. A table like table.py's."""

from mutant import of

STEP = ("tests/unit/model/test_replay.py",)
LAYOUTS = ("tests/parallel/test_replay_layouts.py",)

REPLAYED = of(
    STEP,
    ("router.route", "experts_TK.where(given_TK[:, :1] < 0, given_TK)", "experts_TK"),
    ("router.route", "experts_TK.where(given_TK[:, :1] < 0, given_TK)", "given_TK.long().clamp(min=0)"),
    ("MoE.forward", "_routed(chosen_TK, counted_BS)", "chosen_TK"),
    ("MoE.forward", "global_sequences, counted_BS)", "global_sequences, own_routed_BS)"),
    ("moe._counted", "free_BS & routed_BS", "free_BS"),
    ("Replay.of_layer", "self.experts_BSMK[:, :, place]", "self.experts_BSMK[:, :, 0]"),
    ("ArchitectureFields.place_among_moe", "range(index)", "range(1, index + 1)"),
    ("Trainer._own_sums", "statistics.copies}", "sum(each.sum() for each in statistics.expert_counts.values())}"),
) + of(
    LAYOUTS,
    ("MoE.forward", "self.tp.own_keys(replayed_BSK).flatten", "replayed_BSK[:, :own_BSH.shape[1]].flatten"),
    ("division._micro_batch", "Replay(own.inputs.get(REPLAYED))",
     "Replay(own.inputs[REPLAYED].flip(1) if REPLAYED in own.inputs else None)"),
    ("division.own_part", "inputs={**batch.inputs, **inputs}", "inputs={**inputs, **batch.inputs}"),
)
