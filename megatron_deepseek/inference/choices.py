"""The choices of one step: which tokens its rows of logits give.

Shapes: R rows, V ids that may be chosen.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_deepseek.inference.request import Sequence
from megatron_deepseek.inference.sampling import Choice, choose, is_adjusted, next_token, way_of

BYTES = 2**26  # of the running sums of weights, in float64, that exist at once


@dataclass(frozen=True, eq=False)
class Choices:
    """The tokens of rows. Of sequences whose logits nothing adjusts `made` has those of all rows, as if all drafts were
    right. Penalties and grammars depend on the tokens before, so others are chosen when it is known how they go on.
    """

    logits_RV: torch.Tensor
    made: dict[int, Choice]

    @classmethod
    def of(cls, logits_RV: torch.Tensor, sequences: Iterable[tuple[Sequence, range]]) -> "Choices":
        """Choose what can be chosen at once; `sequences` with their rows."""
        alike, made = defaultdict(list), {}
        for sequence, rows in sequences:
            if not is_adjusted(sequence):
                answered = sequence.num_answered - rows.start
                alike[way_of(sequence.parameters)] += [(row, sequence, answered + row) for row in rows]
        at_once = max(1, BYTES // (8 * logits_RV.shape[1]))
        for group in alike.values():
            for begin in range(0, len(group), at_once):
                rows, owners, places = zip(*group[begin:begin + at_once])
                own_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[list(rows)]
                made.update(zip(rows, choose(own_RV, owners, places)))
        return cls(logits_RV, made)

    def __call__(self, row: int, sequence: Sequence) -> Choice:
        """Return the choice of a row, of which `sequence` has all tokens before it."""
        return self.made[row] if row in self.made else next_token(self.logits_RV[row], sequence)
