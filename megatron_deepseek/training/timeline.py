"""Converts between iterations and samples of one run.

Everything that changes during a run follows the samples that it consumed, as in Megatron-LM. Iterations differ in their
samples: under a batch-size ramp, and after a resume with another --global-batch-size. A run knows the sizes of its past
(TrainState.batches) and, from its arguments, those of its future.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.settings import BatchSettings, RunSettings


def global_batch_size(settings: BatchSettings, consumed_samples: int) -> int:
    """Return the number of sequences in the batch of the next update, after `consumed_samples`.

    The ramp takes equal numbers of samples to each size below the last. The division is Megatron's, in floating
    point, so that a run that began there changes size at the same sample.
    """
    final = settings.global_batch_size
    start, increment, samples = settings.rampup_batch_size or (final, 1, 0)
    if start == final or samples == 0 or consumed_samples > samples:
        return final
    samples_per_size = samples / ((final - start) // increment)
    return start + int(consumed_samples / samples_per_size) * increment


def batch_sizes(settings: BatchSettings) -> tuple[int, ...]:
    """Return every global batch size of the run, ascending: each must divide among micro-batches and data ranks."""
    if settings.rampup_batch_size is None:
        return (settings.global_batch_size,)
    start, increment, samples = settings.rampup_batch_size
    if start < 1 or increment < 1 or samples < 0:
        raise ValueError(f"rampup_batch_size {start} {increment} {samples} is not a size, an increment and a length")
    if start > settings.global_batch_size:
        raise ValueError(f"rampup_batch_size starts at {start}, above global_batch_size {settings.global_batch_size}")
    if (settings.global_batch_size - start) % increment:
        raise ValueError(f"rampup_batch_size {start} does not reach global_batch_size {settings.global_batch_size} "
                         f"in increments of {increment}")
    return tuple(range(start, settings.global_batch_size + 1, increment))


@dataclass(frozen=True)
class Timeline:
    """A run from its first batch on: `batches`, as (updates, sequences in each), then endless batches of `final`."""

    batches: tuple[tuple[int, int], ...]
    final: int

    def samples(self, iterations: int) -> int:
        """Return the number of samples that the first `iterations` updates consume."""
        samples = 0
        for updates, size in self.batches:
            taken = min(updates, iterations)
            samples, iterations = samples + taken * size, iterations - taken
        return samples + iterations * self.final

    def iterations(self, samples: int) -> int:
        """Return how many whole batches the first `samples` are; a last partial batch is left out, as Megatron does."""
        iterations = 0
        for updates, size in self.batches:
            if samples < updates * size:
                return iterations + samples // size
            samples, iterations = samples - updates * size, iterations + updates
        return iterations + samples // self.final


def timeline(batch: BatchSettings, state: TrainState = TrainState()) -> Timeline:
    """Return the timeline of a run that is at `state` and goes on with `batch`."""
    batches, consumed = list(with_past(state, batch).batches), state.consumed_samples
    ramp_samples = batch.rampup_batch_size[2] if batch.rampup_batch_size else -1
    while consumed <= ramp_samples:
        size = global_batch_size(batch, consumed)
        within_ramp = range(consumed, ramp_samples + 1, size)
        updates = bisect_right(within_ramp, size, key=lambda before: global_batch_size(batch, before))
        batches.append((updates, size))
        consumed += updates * size
    return Timeline(tuple(batches), batch.global_batch_size)


def with_past(state: TrainState, batch: BatchSettings) -> TrainState:
    """Return `state` with a record of its batches, which a checkpoint of an older version lacks.

    Where it is missing, the run is taken to have had `batch` from its start if that comes to as many samples, else
    batches of sizes as equal as possible.
    """
    if sum(updates for updates, _ in state.batches) == state.iteration:
        return state
    past = timeline(batch)
    if past.samples(state.iteration) == state.consumed_samples:
        batches = _first(past, state.iteration)
    else:
        size, larger = divmod(state.consumed_samples, state.iteration)
        batches = ((state.iteration - larger, size), (larger, size + 1))
    return replace(state, batches=tuple(run for run in batches if run[0]))


def _first(past: Timeline, iterations: int) -> list[tuple[int, int]]:
    """Return the batches of the first `iterations` updates, as (updates, sequences in each)."""
    batches = []
    for updates, size in (*past.batches, (iterations, past.final)):
        taken = min(updates, iterations)
        batches.append((taken, size))
        iterations -= taken
    return batches


def last_iteration(run: RunSettings, batch: BatchSettings, state: TrainState = TrainState()) -> int:
    """Return the iteration after which a run that is at `state` ends; that of `state` if it is past its end.

    --train-iters counts iterations, whatever their size. --train-samples is the number of samples that all batches
    together may take, those before `state` included.
    """
    if run.train_samples is None:
        return run.train_iters
    return max(timeline(batch, state).iterations(run.train_samples), state.iteration)
