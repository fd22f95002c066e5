"""What the storages of a training are: weights, gathered weights, gradients, moments; all else is told by its life.

    weights           shards and buffers, which are there all the time
    gathered weights  whole weights that layers compute with
    gradients         sums over micro-batches, whole, and reduced ones, in shards
    optimizer         moments
    batch             the rows of the step
    activations       made in an act (or received between two) and still there when it ends
    temporaries       made and freed in the same act, or between two
    host              shards and moments with --optimizer-cpu-offload, and activations that were sent to the host: not
                      on the device, and in no sum
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.dry_run.storages import Allocation, StorageLog
from megatron_deepseek.parallel.data import gathered_weights, held_gradients, held_shards
from megatron_deepseek.parallel.watch import Act
from megatron_deepseek.training.trainer import Trainer

WEIGHTS, GATHERED, GRADIENTS, OPTIMIZER = "weights", "gathered weights", "gradients", "optimizer"
BATCH, ACTIVATIONS, TEMPORARIES = "batch", "activations", "temporaries"
HOST = "host"
CATEGORIES = (WEIGHTS, GATHERED, GRADIENTS, OPTIMIZER, BATCH, ACTIVATIONS, TEMPORARIES, HOST)
_OFFLOADS, _TO_HOST = "ops/offload.py", " to_host"


def category(allocation: Allocation) -> str:
    """Return what an allocation is, one of CATEGORIES, once the step is over."""
    if allocation.label is not None:
        return allocation.label
    if allocation.line.startswith(_OFFLOADS) and allocation.line.endswith(_TO_HOST):
        return HOST
    return ACTIVATIONS if allocation.outlived else TEMPORARIES


def label_states(log: StorageLog, trainer: Trainer, batch: Batch) -> None:
    """Name what stands before the first act: shards, buffers, moments and the batch."""
    on_host = trainer.spec.build.offload.optimizer_cpu_offload
    _label_shards(log, trainer)
    for stage in trainer.stages:
        for name, tensor in (*stage.named_buffers(), ("rotary table", stage.rope_2SD)):
            log.label(tensor, WEIGHTS, name)
    for each in trainer.parameters:
        for tensor in trainer.optimizer.state.get(each.parameter, {}).values():
            log.label(tensor, HOST if on_host else OPTIMIZER, f"moment of {each.name}")
    for tensor in (batch.tokens_BS, batch.labels_BS, batch.weights_BS):
        log.label(tensor, BATCH)


def _label_shards(log: StorageLog, trainer: Trainer) -> None:
    on_host = trainer.spec.build.offload.optimizer_cpu_offload
    for stage in trainer.stages:
        for name, tensor in held_shards(stage):
            log.label(tensor, HOST if on_host else WEIGHTS, name)


def label_passing(log: StorageLog, trainer: Trainer) -> None:
    """Name the storages that are gathered weights and gradients, of those that are there now, and shards: of those that
    FSDP has to pad it makes new ones in the first forward, where a tensor has no address, as fake ones have none.
    """
    _label_shards(log, trainer)
    for stage in trainer.stages:
        for name, tensor in gathered_weights(stage):
            log.label(tensor, GATHERED, name)
        for name, tensor in held_gradients(stage):
            log.label(tensor, GRADIENTS, f"gradient of {name}")
    if trainer.spec.build.offload.optimizer_cpu_offload:
        for each in trainer.parameters:
            if each.parameter.grad is not None:
                log.label(each.parameter.grad, HOST, f"gradient of {each.name}")


@dataclass
class LabellingWatch:
    """The pipeline's watch of a dry run: it tells `log` of each act, and labels what is there behind it.

    `trainer` is known only once it is built, with this watch.
    """

    log: StorageLog
    trainer: Trainer | None = None

    @contextmanager
    def __call__(self, act: Act) -> Iterator[None]:
        with self.log(act):
            yield
        if self.trainer is not None:
            label_passing(self.log, self.trainer)
