"""Keeps answers to their grammars: which tokens may come next, however many come in a step.

A constraint is asked for the tokens that may come and told the one that was taken, so drafts need no care: the row of
logits after an accepted draft is drawn from with what may follow it, and where a draft was wrong nothing was told. A
sequence that gives up its blocks keeps its constraint, as it keeps its tokens.
"""

import importlib.util
import json
from collections.abc import Collection

import numpy as np
import torch

from megatron_deepseek.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatron_deepseek.inference.grammar import Grammar, need_library

_KEPT = 32  # compiled grammars, of which each answer gets a copy


class Constraint:
    """Where one answer stands in its grammar. `ends` are the tokens that end the answer, allowed once it is complete.
    """

    def __init__(self, matcher, grammar: Grammar, ends: Collection[int]):
        self._matcher, self._grammar, self._ends = matcher, grammar, list(ends)
        self._begun = grammar.begins_after is None

    def allowed(self, number: int) -> torch.Tensor:
        """Return which of the first `number` tokens may come next, bool [number].

        Before a grammar that must begin all may but the ends: the answer would have nothing that keeps to it.
        """
        if not self._begun:
            allowed_V = torch.ones(number, dtype=torch.bool)
            allowed_V[self._ends] = not self._grammar.must_begin
            return allowed_V
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = torch.from_numpy(np.unpackbits(bits, bitorder="little")[:number].copy()).bool()
        if len(allowed_V) < number:
            allowed_V = torch.nn.functional.pad(allowed_V, (0, number - len(allowed_V)))
        allowed_V[self._ends] = self._matcher.is_accepting()
        return allowed_V

    def add(self, token: int) -> None:
        """Take note of a token of the answer. One that ends it is the last, whatever the grammar makes of it."""
        if not self._begun:
            self._begun = token == self._grammar.begins_after
        else:
            self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Return whether nothing more can come."""
        return self._begun and self._matcher.is_stopped() and not self.failed

    @property
    def failed(self) -> str | None:
        """Return why the grammar cannot be followed any further, as where it grew beyond the library's limits."""
        return self._matcher.get_error() or None


class Constraints:
    """Compiles the grammars of an engine's requests for its tokenizer, whose first `num_ids` ids may be chosen."""

    def __init__(self, tokenizer: Tokenizer | None, num_ids: int):
        self._tokenizer, self._num_ids = tokenizer, num_ids
        self._vocabulary = None
        self._compiled: dict[str, object] = {}

    def prepare(self) -> None:
        """Read the vocabulary, which takes a second or two, before the first request needs it."""
        if importlib.util.find_spec("llguidance") is not None and isinstance(self._tokenizer, HuggingFaceTokenizer):
            self._words()

    def check(self, grammar: Grammar) -> None:
        """Raise ValueError, begun by the grammar's name, for one that cannot be kept to."""
        need_library(grammar.name)
        if not isinstance(self._tokenizer, HuggingFaceTokenizer):
            raise ValueError(f"{grammar.name}: needs a model with a tokenizer.json, which this one was loaded without")
        self._compile(grammar)

    def constraint(self, grammar: Grammar | None, ends: Collection[int]) -> Constraint | None:
        """Return the constraint of a new answer."""
        if grammar is None:
            return None
        own = [token for token in ends if token < self._num_ids]
        return Constraint(self._compile(grammar).deep_copy(), grammar, own)

    def _compile(self, grammar: Grammar):
        from llguidance import LLMatcher
        found = self._compiled.get(grammar.definition)
        if found is None:
            found = LLMatcher(self._words(), grammar.definition, log_level=0)
            if found.is_error():
                raise ValueError(f"{grammar.name}: {_one_line(found.get_error())}")
            while len(self._compiled) >= _KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[grammar.definition] = found
        return found

    def _words(self):
        """Return the vocabulary in the library's form. All added tokens are special: no text of an answer has them."""
        if self._vocabulary is None:
            from llguidance import LLTokenizer
            described = json.loads(self._tokenizer.backend.to_str())
            for token in described.get("added_tokens", ()):
                token["special"] = True
            self._vocabulary = LLTokenizer(json.dumps(described), n_vocab=self._tokenizer.vocab_size,
                                           eos_token=self._tokenizer.eod)
        return self._vocabulary


def _one_line(error: str) -> str:
    return " ".join(error.split())[:300]
