"""Judges sampled answers while more are sampled: rewards of a prompt's answers, kept as soon as they are there."""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_deepseek.cli.sample_prompts import SampledPrompt
from megatron_deepseek.evaluation.kept_answers import checkpoint_digest
from megatron_deepseek.rewards.result import RewardResult
from megatron_deepseek.rewards.spec import RewardSpec
from megatron_deepseek.rewards.texts import TOKENS_COLUMN
from megatron_deepseek.rewards.workers import RewardWorkers
from megatron_deepseek.runtime.kept_records import KeptRecords, digest_of

_AHEAD = 8  # prompts that wait to be judged, for each that is judged


class Judge:
    """Rewards the answers of prompts in threads of its own, `at_a_time` prompts at once; all else is the caller's."""

    def __init__(self, workers: RewardWorkers, kept: KeptRecords, at_a_time: int):
        self.workers, self.kept = workers, kept
        self._threads = ThreadPoolExecutor(at_a_time)
        self._most = _AHEAD * at_a_time
        self._waiting: deque[tuple[SampledPrompt, Future]] = deque()

    def submit(self, prompt: SampledPrompt, answers: Sequence[Mapping]) -> None:
        """Let the answers of a prompt be judged, unless their rewards are kept already."""
        if not self.workers.specs or prompt.number in self.kept:
            return
        self._waiting.append((prompt, self._threads.submit(self._score, prompt, answers)))
        while self._waiting and (self._waiting[0][1].done() or len(self._waiting) > self._most):
            self._keep_first()

    def finish(self) -> None:
        """Wait for all that was submitted."""
        while self._waiting:
            self._keep_first()
        self._threads.shutdown()

    def _score(self, prompt: SampledPrompt, answers: Sequence[Mapping]) -> RewardResult:
        rows = [{**prompt.row, TOKENS_COLUMN: each["tokens"]} for each in answers]
        return self.workers.score([prompt.text] * len(answers), [each["text"] for each in answers], rows)

    def _keep_first(self) -> None:
        prompt, future = self._waiting.popleft()
        result = future.result()
        self.kept.keep(prompt.number, {"values": result.values, "failures": result.failures})


def judged_digest(specs: Sequence[RewardSpec]) -> str:
    """Return what tells these rewards from others: their options, and the content of their files. Weights are no part.
    """
    return digest_of(*([spec.name, str(spec), _content(spec)] for spec in specs))


def _content(spec: RewardSpec) -> str:
    if spec.path is None:
        return ""
    return checkpoint_digest(spec.path) if spec.is_model else digest_of(Path(spec.path).read_text(errors="replace"))
