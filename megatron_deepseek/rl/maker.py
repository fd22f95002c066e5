"""Makes the batches of reinforcement learning: a rollout by the model of the moment, and its samples for each update.

All that decides a rollout is the weights, the seed, its number and how many prompts were asked before it. A checkpoint
between two updates with the same rollout holds that; a run that begins elsewhere makes its rollout again.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_deepseek.checkpoint.job.distributed import together
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.rl.advantages import group_advantages
from megatron_deepseek.rl.collecting import Collector
from megatron_deepseek.rl.judging import Judge
from megatron_deepseek.rl.measures import rollout_reports
from megatron_deepseek.rl.records import Records
from megatron_deepseek.rl.reference import Reference
from megatron_deepseek.rl.rollout.engine import RolloutEngine
from megatron_deepseek.rl.rollouts import Rollout, read_rollout, write_rollout
from megatron_deepseek.rl.rows import RowShape, pack_samples
from megatron_deepseek.rl.samples import OLD, REFERENCE
from megatron_deepseek.rl.scoring import scores
from megatron_deepseek.runtime.task import MadeBatch
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer

MASK = "mask"  # of --overlong


class RolloutMaker:
    """The maker of a run. All ranks make one and call it in the same order.

    `reference`: None where no loss reads it. `records`: on rank 0, where samples are kept.
    """

    def __init__(self, settings: Settings, shape: RowShape, engine: RolloutEngine, collector: Collector, judge: Judge,
                 reference: Reference | None, records: Records | None):
        self.settings, self.shape, self.engine, self.collector, self.judge = settings, shape, engine, collector, judge
        self.reference, self.records = reference, records
        self.rollout: Rollout | None = None
        self._iteration = 0  # behind which the run is when the next checkpoint is made

    def make(self, trainer: Trainer, state: TrainState, size: int) -> MadeBatch:
        reports: Mapping[str, float] = {}
        if self.rollout is None or self.rollout.is_over(state.iteration):
            self.rollout, reports = self._begin(trainer, state, size)
        self._iteration = state.iteration + 1
        return MadeBatch(self._batch(self.rollout, state.iteration), reports)

    def keep(self) -> Callable[[Path], None]:
        if self.reference is not None:
            self.reference.checkpoint_begins(self._iteration)
        return partial(write_rollout, self.rollout, self._iteration) if self.rollout is not None else lambda _: None

    def resume(self, directory: Path, state: TrainState) -> None:
        self.rollout, self._iteration = together(lambda: read_rollout(directory)), state.iteration
        if self.reference is not None:
            self.reference.resume(state)

    def close(self) -> None:
        self.judge.close()

    def _begin(self, trainer: Trainer, state: TrainState, size: int) -> tuple[Rollout, dict[str, float]]:
        """Return a new rollout for updates of `size` samples, and what there is to report of it."""
        before = self.rollout or Rollout(-1, 0, 0, ())
        if self.reference is not None:
            self.reference.before_rollout(state)
        begun = time.perf_counter()
        self.engine.refresh()
        refreshed = time.perf_counter()
        collected = self.collector.collect(before.number + 1, before.used)
        self.engine.release()
        groups = [sample.group for sample in collected.samples]
        advantages = group_advantages(collected.verdict.total, groups, self.settings.policy_loss).values_N.tolist()
        updates = divide(len(groups), self.settings, size, before.number + 1)
        rollout = Rollout(before.number + 1, state.iteration, before.used + collected.used, updates, collected.samples,
                          tuple(advantages))
        made = time.perf_counter()
        rollout = self._scored(trainer, rollout)
        seconds = {"resharding_seconds": refreshed - begun, "scoring_seconds": time.perf_counter() - made}
        reports = rollout_reports(collected, advantages) | seconds
        if self.records is not None:
            self.records.write(rollout, collected)
        return rollout, reports

    def _scored(self, trainer: Trainer, rollout: Rollout) -> Rollout:
        """Return the rollout with the log-probabilities that its updates need beside those of the moment.

        The reference routes tokens as it would itself, whatever routing is kept.
        """
        score = partial(scores, trainer, shape=self.shape, temperature=self.settings.policy_loss.temperature)
        if len(rollout.updates) > 1:
            rollout = replace(rollout, old=score(rollout.samples))
        if self.reference is not None:
            with self.reference.in_trainer():
                routed = [replace(sample, experts=None) for sample in rollout.samples]
                rollout = replace(rollout, reference=score(routed))
        return rollout

    def _batch(self, rollout: Rollout, iteration: int) -> Batch:
        """Return this data rank's rows of the update behind `iteration`."""
        places = rollout.updates[iteration - rollout.iteration]
        of_tokens = {name: [found[place] for place in places]
                     for name, found in ((OLD, rollout.old), (REFERENCE, rollout.reference)) if found is not None}
        advantages_N = torch.tensor([rollout.advantages[place] for place in places], dtype=torch.float64)
        return pack_samples([rollout.samples[place] for place in places], advantages_N, self.shape, of_tokens,
                            self.settings.policy_loss.overlong == MASK).batch


def divide(samples: int, settings: Settings, size: int, number: int) -> tuple[tuple[int, ...], ...]:
    """Return the places of the samples of each update with rollout `number`.

    A full rollout has updates of `size` samples. One that lacks groups has as many, with fewer samples each, as even as
    can be. Each pass over the samples draws anew which of them share an update.
    """
    rollout = settings.rollout
    each = max(1, rollout.prompts * rollout.group_size // size)
    passes = (np.random.default_rng((settings.run.seed, number, each_pass)).permutation(samples)
              for each_pass in range(rollout.iterations))
    return tuple(tuple(np.sort(part).tolist()) for order in passes for part in np.array_split(order, each))
