"""Rules by which sampled answers become training data or are rejected (DeepSeek-R1, section 2.3.3: several answers to
each prompt, of which right ones are kept, without mixed languages and chaos).

Filters come first, in the order of REASONS, and an answer is counted by the first that it does not pass.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_deepseek.rewards.words import language_of, language_share, repetition

UNFINISHED, TOO_LONG, NO_ANSWER, CALL = "unfinished", "too long", "no answer", "calls a tool"
REPETITION, LANGUAGE, DUPLICATE = "repetition", "mixed language", "duplicate"
NO_REWARD, LOW_REWARD, NOT_KEPT = "no reward", "reward too low", "not among the kept"
REASONS = (UNFINISHED, TOO_LONG, NO_ANSWER, CALL, REPETITION, LANGUAGE, DUPLICATE, NO_REWARD, LOW_REWARD, NOT_KEPT)

QUESTION, ANY = "question", "any"  # languages: that of the question; no filter
ALL, BEST = "all", "best"  # what is kept of a prompt's accepted answers


@dataclass(frozen=True)
class Candidate:
    """An answer as the model gave it. `finished`: it ended by itself, not by the number of its `tokens`."""

    reasoning: str | None
    content: str
    tokens: int
    finished: bool
    calls: bool = False

    @property
    def words(self) -> str:
        """Return all that it says, without tags."""
        return f"{self.reasoning}\n{self.content}" if self.reasoning else self.content


@dataclass(frozen=True)
class Filters:
    """What an answer must be. `repetition`: the most of its runs of four words that may repeat earlier ones.

    `language`: a code, QUESTION or ANY; `language_share`: the least share of letters of its script. `accept_at`: the
    least total reward, None where nothing rewards. `longest`: in tokens. `keep`: ALL, BEST, or how many of a prompt.
    """

    repetition: float = 0.5
    language: str = ANY
    language_share: float = 0.9
    longest: int | None = None
    accept_at: float | None = None
    keep: str | int = ALL


def verdicts(question: str, candidates: Sequence[Candidate], totals: Sequence[float | None], filters: Filters
             ) -> list[str | None]:
    """Return why each answer to a question is rejected, None for one that is kept."""
    language = language_of(question) if filters.language == QUESTION else \
        None if filters.language == ANY else filters.language
    found: list[str | None] = []
    seen: set[tuple[str | None, str]] = set()
    for candidate, total in zip(candidates, totals, strict=True):
        reason = _fault(candidate, language, filters)
        if reason is None and (candidate.reasoning, candidate.content) in seen:
            reason = DUPLICATE
        seen.add((candidate.reasoning, candidate.content))
        found.append(reason or _fault_of_reward(total, filters))
    kept = _kept([place for place, reason in enumerate(found) if reason is None], totals, filters.keep)
    return [NOT_KEPT if reason is None and place not in kept else reason for place, reason in enumerate(found)]


def _fault(candidate: Candidate, language: str | None, filters: Filters) -> str | None:
    """Return why an answer is rejected whatever its reward."""
    if not candidate.finished:
        return UNFINISHED
    if filters.longest is not None and candidate.tokens > filters.longest:
        return TOO_LONG
    if candidate.calls:
        return CALL
    if not candidate.content.strip():
        return NO_ANSWER
    if repetition(candidate.words) > filters.repetition:
        return REPETITION
    if language is not None and language_share(candidate.words, language) < filters.language_share:
        return LANGUAGE
    return None


def _fault_of_reward(total: float | None, filters: Filters) -> str | None:
    if filters.accept_at is None:
        return None
    return NO_REWARD if total is None else LOW_REWARD if total < filters.accept_at else None


def _kept(accepted: Sequence[int], totals: Sequence[float | None], keep: str | int) -> set[int]:
    """Return the places that are kept of those accepted: the best by reward, of equal ones the first."""
    if keep == ALL:
        return set(accepted)
    most = 1 if keep == BEST else int(keep)
    ranked = sorted(accepted, key=lambda place: (-math.inf if totals[place] is None else totals[place]), reverse=True)
    return set(ranked[:most])


@dataclass
class Tally:
    """Counts over all prompts, as a table and for a file. `unusable`: prompts that could not be asked, by reason."""

    unusable: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    prompts: int = 0
    answers: int = 0
    kept: int = 0
    tokens: int = 0
    kept_tokens: int = 0
    by_accepted: Counter = field(default_factory=Counter)
    rewards: dict[str, Counter] = field(default_factory=dict)

    def add(self, candidates: Sequence[Candidate], reasons: Sequence[str | None]) -> None:
        """Count the answers to a prompt."""
        self.prompts, self.answers = self.prompts + 1, self.answers + len(candidates)
        self.tokens += sum(each.tokens for each in candidates)
        kept = [each for each, reason in zip(candidates, reasons) if reason is None]
        self.kept, self.kept_tokens = self.kept + len(kept), self.kept_tokens + sum(each.tokens for each in kept)
        self.rejected.update(each for each in reasons if each is not None)
        accepted = sum(each in (None, NOT_KEPT) for each in reasons)
        self.by_accepted["none" if not accepted else "all" if accepted == len(reasons) else "some"] += 1

    def add_rewards(self, name: str, values: Iterable[float | None], failures: dict[str, int]) -> None:
        """Count what a reward gave for a prompt's answers."""
        counts, there = self.rewards.setdefault(name, Counter()), list(values)
        numbers = [each for each in there if each is not None]
        counts.update({"answers": len(there), "valued": len(numbers), "sum": math.fsum(numbers), **failures})

    def record(self) -> dict:
        """Return all counts in JSON's types, reasons in their order."""
        return {"prompts": self.prompts, "unusable_prompts": dict(sorted(self.unusable.items())),
                "answers": self.answers, "kept": self.kept,
                "rejected": {reason: self.rejected[reason] for reason in REASONS if self.rejected[reason]},
                "prompts_by_accepted_answers": {name: self.by_accepted[name] for name in ("none", "some", "all")},
                "tokens": self.tokens, "kept_tokens": self.kept_tokens,
                "rewards": {name: _of_reward(counts) for name, counts in self.rewards.items()}}

    def lines(self) -> list[str]:
        """Return the table that is printed: answers by what became of them, prompts, and rewards."""
        rows = [("kept", self.kept), *((reason, self.rejected[reason]) for reason in REASONS if self.rejected[reason])]
        table = [f"{self.answers:,} answers to {self.prompts:,} prompts, {self.tokens:,} tokens"]
        table += [f"  {name:<20}{count:>10,}{_share(count, self.answers):>9}" for name, count in rows]
        table += [f"  prompts with {name} accepted: {self.by_accepted[name]:,}" for name in ("none", "some", "all")]
        table += [f"  prompts not asked: {count:,} ({reason})" for reason, count in sorted(self.unusable.items())]
        return table + [f"  reward {name}: {_words(_of_reward(counts))}" for name, counts in self.rewards.items()]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _of_reward(counts: Counter) -> dict:
    """Return a reward's mean over the answers that have a value, how many have none, and its failures by kind."""
    failures = {kind: count for kind, count in sorted(counts.items()) if kind not in ("answers", "valued", "sum")}
    mean = counts["sum"] / counts["valued"] if counts["valued"] else None
    return {"mean": mean, "without_value": counts["answers"] - counts["valued"], "failures": failures}


def _words(found: dict) -> str:
    mean = "no value" if found["mean"] is None else f"mean {found['mean']:.4f}"
    missing = f", {found['without_value']:,} without a value" if found["without_value"] else ""
    return mean + missing + "".join(f", {count:,} {kind}" for kind, count in found["failures"].items())
