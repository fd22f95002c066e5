"""Mistakes in kept routing and in what the engine says of a rollout. A table like table.py's."""

from mutant import of

STEP = ("tests/unit/model/test_kept_routing.py",)
SAMPLING = ("tests/unit/inference/test_sampling.py",)
READINGS = ("tests/unit/inference/test_rollout_readings.py",)
KEPT = ("tests/unit/rl/test_kept_rollouts.py",)
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
) + of(
    READINGS,
    ("log_probabilities_of", "found_R - weights_RN.double().sum(-1).log() if parameters.cuts else found_R", "found_R"),
    ("sampling.choose", "log_probabilities_of(tokens_R, scaled_RV,", "log_probabilities_of(tokens_R, logits_RV,"),
    ("sampling.kept_of", "places if ids_RN is None else ids_RN[rows, places]", "places"),
    ("sampling.kept_of", "None if len(each) == size else each.clone()", "each.clone()"),
    ("Choices.of", "alike[way_of(sequence.parameters)]", "alike[sequence.parameters.greedy]"),
    ("Choices.of", "answered + row)", "answered)"),
    ("KeptExperts.keep", "batch.slots_T[:batch.num_tokens].cpu()", "batch.previous_T[:batch.num_tokens].cpu()"),
    ("KeptExperts.of", "found_TLK[:, place]", "found_TLK[:, 0]"),
    ("Scheduler._know_hashes", "b\"experts\" if sequence.parameters.chosen_experts else b\"\"", "b\"\""),
    ("Engine.abort", "self.readings.read_experts(sequence)", "pass"),
) + of(
    SAMPLING,
    ("_nucleus", "short_R.any()", "short_R.all()"),
    ("_nucleus", "weights_RN.where(before_RN < top_p * total_R1, 0)", "weights_RN.where(before_RN < top_p, 0)"),
    ("sampling.draw", ".minimum(below_R1)", ""),
) + of(
    KEPT,
    ("rollout.engine.sampling_of", "kept_ids=rollout.keep_sampling_mask", "kept_ids=False"),
    ("rows._replayed", "end - len(of_tokens_TLK):end", "end - 1 - len(of_tokens_TLK):end - 1"),
    ("rows._replayed", "torch.stack([*experts.values()], 1)", "torch.stack([*experts.values()][::-1], 1)"),
)
