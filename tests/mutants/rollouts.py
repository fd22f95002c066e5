"""Mistakes in the rollouts of reinforcement learning, and in how weights get to their engine. Like table.py's."""

from mutant import of

ROLLOUTS = of(
    ("tests/parallel/test_resharding.py",),
    ("_Way.legs", "(self.number + place) % len(holders)", "0"),
    ("_Way.legs", "shared.numel if rank in takers else 0", "shared.numel"),
    ("Leg.cut", "min((number + 1) * step, self.region.shape[axis])", "(number + 1) * step"),
    ("Resharding._parts", "costs[name] > self.round_bytes and", "False and"),
    ("Resharding._divide", "used + costs[name] > self.round_bytes", "False"),
    ("Round.add", "sorted([*self.receives, *receives], key=_order)", "[*self.receives, *receives]"),
    ("Resharding.move", "_memory(targets, leg).copy_(_memory(sources, leg))", "pass"),
) + of(
    ("tests/unit/rl/test_rollout_weights.py",),
    ("engine_layout", "rollout.tp or training.tp", "training.tp"),
    ("engine_layout", "Layout(dp=world // tp", "Layout(dp=training.dp"),
    ("check_base", "(there.codes, there.scales)", "(there.codes, here.scales)"),
    ("Layout.shares_experts", "self.tp % self.ep != 0", "self.ep > self.tp"),
    ("seed_of", ":{rollout}:{number}", ":{number}"),
    ("EngineWeights.__init__", "build.precision.activations", "build.precision.master"),
    ("gather_samples", "keys[begin:begin + SAMPLES_AT_A_TIME]", "keys[:SAMPLES_AT_A_TIME]"),
    ("rollout.engine.sampling_of", "chosen_experts=rollout.keep_routing", "chosen_experts=False"),
    ("rollout.weights._join_adapters", "b * scale, matrices", "b, matrices"),
    ("rollout.weights._join_adapters", "AdaptedWeight(base, a, b, scale)", "AdaptedWeight(base, a, b, 1.0)"),
) + of(
    ("tests/parallel/test_rollouts.py",),
    ("rollout.weights.parts_of", "(*stage.named_parameters(), *stage.named_buffers())", "stage.named_parameters()"),
    ("RolloutEngine.release", "self._engine = None", "pass"),
    ("RolloutEngine.release", "gc.collect()", "pass"),
    ("RolloutEngine.generate", 'rank("tp") == 0', 'rank("tp") == 1'),
    ("gather_samples", "sorted(_of_all(small), key=lambda item: item[0])", "_of_all(small)"),
)
