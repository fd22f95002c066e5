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
)
