"""Drafts by Multi-Token Prediction: tokens that the next step verifies, several in one forward.

A draft is verified by doing what would be done without it: the token at its place is drawn from the main model's
logits, with the request's own generator, and the draft is accepted if it is that token. So text with drafts is text
without them, whatever is sampled. A draft x is accepted with its probability p(x), and a token in its place is
distributed as p without x: that is the rule of speculative sampling (arXiv 2211.17192) for drafts that are certain.

Module m at place s joins token s with the state of depth m - 1 at place s - 1, and its position is s - m, as in
training, where it is that of the state. A place thus depends on tokens up to its own, as the main model's does, and
blocks of equal tokens can be shared with what modules keep. Draft j is made by module j at the place j - 1 after the
last token; beyond the last module, that one is applied to its own states.

What is written at places of drafts is provisional: once tokens are known, modules compute these places again.
"""

from dataclasses import dataclass, field

from megatron_deepseek.inference.batch import Piece
from megatron_deepseek.inference.forward import InferenceModel
from megatron_deepseek.inference.request import Sequence


@dataclass
class DraftCounts:
    """How many drafts were proposed and accepted, by place after the last token."""

    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @classmethod
    def zeros(cls, number: int) -> "DraftCounts":
        return cls([0] * number, [0] * number)

    def add(self, proposed: int, accepted: int) -> None:
        """Count the drafts of one sequence that were verified in a step."""
        for place in range(proposed):
            self.proposed[place] += 1
            self.accepted[place] += place < accepted


class Drafter:
    """Drafts tokens with the MTP modules of a model, as many a step as the settings say."""

    def __init__(self, model: InferenceModel):
        self.model, self.settings = model, model.settings

    def draft(self, sequences: list[Sequence], lockstep: bool = False) -> None:
        """Let the modules compute what the main model has computed of `sequences`, and draft where an answer goes on.

        In `lockstep` with other ranks every round makes a forward, even of nothing.
        """
        drafting = {sequence: wanted for sequence in sequences if (wanted := self._wanted(sequence))}
        for number in range(1, self.settings.draft_tokens + 1):
            wanting = [sequence for sequence, wanted in drafting.items() if wanted >= number]
            given = sequences if number <= self.model.num_depths else wanting
            self._round(number, given, set(wanting), lockstep)
        for sequence in sequences:
            sequence.num_filled = min(sequence.num_computed + 1, len(sequence.tokens))

    def _wanted(self, sequence: Sequence) -> int:
        """Return how many drafts can be of use."""
        if not sequence.decoding:
            return 0
        left = min(sequence.parameters.max_tokens - sequence.num_answered,
                   self.settings.max_length - len(sequence.tokens))
        return max(min(self.settings.draft_tokens, left - 1), 0)

    def _round(self, number: int, sequences: list[Sequence], wanting: set[Sequence], lockstep: bool) -> None:
        """Apply one module to `sequences`, and add the draft of this number to those that want it."""
        pieces = {sequence: piece for sequence in sequences
                  if (piece := self._piece(number, sequence, sequence in wanting)).tokens}
        if not pieces and not lockstep:
            return
        batch = self.model.batch(list(pieces.values()))
        states_TH = self.model.depth_states(number, batch)
        rows = {sequence: row + len(piece.tokens) - 1 for (sequence, piece), row in zip(pieces.items(), batch.rows)
                if sequence in wanting}
        if rows:
            drafts = self.model.logits(states_TH, list(rows.values())).argmax(-1).tolist()
            for sequence, draft in zip(rows, drafts):
                sequence.drafts.append(draft)

    def _piece(self, number: int, sequence: Sequence, drafts: bool) -> Piece:
        """Return the places that the module of draft `number` computes of a sequence."""
        depth = min(number, self.model.num_depths)
        known = min(sequence.num_computed + 1, len(sequence.tokens))
        end = len(sequence.tokens) - 1 + number if drafts else known
        begin = end - 1 if number > depth else max(sequence.num_filled, depth)
        tokens = [*sequence.tokens[begin:end], *sequence.drafts[max(begin - len(sequence.tokens), 0):
                                                               max(end - len(sequence.tokens), 0)]]
        return Piece(tokens, sequence.blocks, begin, first=depth, lag=depth)
