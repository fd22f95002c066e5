"""The job that fills a cache: the teacher reads the rows of a run's data, and rank 0 writes what it predicts.

Rows are read in batches that do not change, in any layout that training has. A batch is the unit of what a killed job
loses: those whose samples are all done are not read again, and the others are read as before, so that the files are the
same as without the kill, byte for byte. Memory holds a batch.

Shapes: B rows of all data ranks, S tokens, K ids of a token.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from json import dumps

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_deepseek.checkpoint.integrity import weights_identity
from megatron_deepseek.checkpoint.loadable import check_directory
from megatron_deepseek.data.batches import Sampler, sample_indices
from megatron_deepseek.fine_tuning_settings import LogitCacheSettings
from megatron_deepseek.finetuning.data import Conversations
from megatron_deepseek.finetuning.distillation.cache_files import CachedDataset, Description, dataset_key
from megatron_deepseek.finetuning.distillation.teacher import TeacherFiles, open_model
from megatron_deepseek.finetuning.distillation.same_tokens import entries_digest, run_entries
from megatron_deepseek.finetuning.loop import FineTuning
from megatron_deepseek.finetuning.prepare import Prepared
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Rows as StepRows
from megatron_deepseek.model.step import StepStatistics
from megatron_deepseek.parallel.collectives import all_gather
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.start import choose_device, join_job
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits
from megatron_deepseek.runtime.failure import guarded
from megatron_deepseek.runtime.job import training_spec
from megatron_deepseek.runtime.user_errors import end_on_user_error
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer


def cache_logits(settings: Settings) -> None:
    """Fill the cache of `settings` on this rank, whose model is the teacher. A user's mistake ends it with status 2."""
    guarded(_run, 60 * settings.run.distributed_timeout_minutes)(settings)


def _run(settings: Settings) -> None:
    task, files = FineTuning(), None
    if int(os.environ.get("RANK", "0")):
        task.wait()
    else:
        with end_on_user_error():
            files = _checked_files(settings)
            task.check(settings)
    device = choose_device()
    join_job(device, settings.run.distributed_timeout_minutes)
    with end_on_user_error():
        settings, conversations = task.conversations(settings)
        files = files or TeacherFiles.find(settings.run.load, settings.run.ckpt_step, "--load")
        cache = LogitCache(settings, files, conversations)
        cache.begin(partial(print, flush=True))
    meshes = build_meshes(settings.layout, device)
    with end_on_user_error():
        teacher = open_model(training_spec(settings), files, meshes)
        cache.fill(teacher)
    dist.barrier()
    dist.destroy_process_group()


def _checked_files(settings: Settings) -> TeacherFiles:
    files = TeacherFiles.find(settings.run.load, settings.run.ckpt_step, "--load")
    check_directory(files.directory, settings.model, weights_alone=True, drop_mtp=True)
    size = settings.fine_tuning.logit_cache.student_vocab_size
    if size is not None and size > files.model.vocab_size:
        raise ValueError(f"--student-vocab-size {size} is more than the teacher's {files.model.vocab_size} ids")
    return files


def describe(settings: Settings, files: TeacherFiles) -> Description:
    """Return what a cache of `settings` is of."""
    kept, run = settings.fine_tuning.logit_cache, settings.run
    decided = [weights_identity(files.directory), asdict(files.model), run.bf16, run.fp8_format, run.fp8_param_gather]
    vocab_size = kept.student_vocab_size or files.model.vocab_size
    return Description(sha256(dumps(decided, default=str).encode()).hexdigest()[:24], str(files.directory),
                       entries_digest(run_entries(settings.data), vocab_size), vocab_size,
                       min(kept.top_k, vocab_size), kept.kd_temperature, kept.cache_dtype)


class LogitCache:
    """The cache of a run's training data, and its filling. Rank 0 has the files."""

    def __init__(self, settings: Settings, files: TeacherFiles, conversations: Conversations):
        prepared = replace(conversations.train, weights=None)  # every sample once
        self.settings, self.rows = settings, Rows(prepared, epochs=1, shuffle=False)
        self.description = describe(settings, files)
        self.datasets: tuple[CachedDataset, ...] = ()
        if dist.get_rank() == 0:
            self.datasets = datasets_of(self.kept, self.description, prepared)

    @property
    def kept(self) -> LogitCacheSettings:
        return self.settings.fine_tuning.logit_cache

    def begin(self, say: Callable[[str], None]) -> None:
        """Say on rank 0 how many bytes the cache takes, and make its files. Raise ValueError or OSError if that cannot
        be done; every rank does.
        """
        told: list = [None]
        if dist.get_rank() == 0:
            try:
                say(self._size())
                self.description.write(self.kept.output)
                for each in self.datasets:
                    each.open_to_write()
            except (ValueError, OSError) as error:
                told = [str(error)]
        dist.broadcast_object_list(told)
        if told[0] is not None:
            raise ValueError(told[0])

    def _size(self) -> str:
        labels, size = (sum(numbers) for numbers in zip(*((int(each.starts[-1]), each.nbytes)
                                                          for each in self.datasets)))
        made = self.description
        return (f"cache of {labels:,} label tokens, the {made.top_k} likeliest ids of each, in {made.cache_dtype}: "
                f"{size:,} bytes ({size / 2**30:,.2f} GiB) in {self.kept.output}")

    def fill(self, teacher: Trainer) -> None:
        """Read every batch with a sample that is not done. All ranks call it."""
        batch, size = self.settings.batch, self.settings.batch.global_batch_size
        sampler = Sampler(self.rows, self.settings.model.vocab_size, self.rows.prepared.settings.option)
        meshes, total = teacher.meshes, self.rows.rows_per_epoch
        starts, wide = self._starts_left(), torch.promote_types(teacher.spec.build.precision.activations, torch.float32)
        shown = tqdm(total=total, initial=max(0, total - len(starts) * size), unit="row", disable=None) \
            if dist.get_rank() == 0 else None
        for start in starts:
            own = sampler.batch(start, size, batch.micro_batch_size, meshes.rank("dp"), meshes.layout.dp)
            found = teacher.read(own.to(meshes.device), self._predictions, wide, StepStatistics(),
                                 2 * self.description.top_k + 1)
            found = found if meshes.layout.dp == 1 else all_gather(found, 0, meshes.group("dp"))
            if shown is not None:
                self._keep(found.cpu().numpy(), start, meshes.layout.dp)
                shown.update(min(size, total - start))
        if shown is not None:
            shown.close()
            print(f"{len(starts)} batches read, {-(-total // size) - len(starts)} were: {self.kept.output}", flush=True)

    def _starts_left(self) -> list[int]:
        """Return on every rank the first rows of the batches with a sample that is not done."""
        told: list = [None]
        if dist.get_rank() == 0:
            size = self.settings.batch.global_batch_size
            told = [[start for start in range(0, self.rows.rows_per_epoch, size) if not all(
                self.datasets[source].done[sample] for number in range(start, start + size)
                for source, sample in self.rows.samples_in(number))]]
        dist.broadcast_object_list(told)
        return told[0]

    def _predictions(self, predictions: Predictions, rows: StepRows) -> torch.Tensor:
        wide = torch.promote_types(predictions.states[0].dtype, torch.float32)
        return torch.cat([each.to(wide) for each in predictions.for_chunks(self._likeliest)], -1)

    def _likeliest(self, logits: VocabularyLogits) -> tuple[torch.Tensor, ...]:
        """Return the ids, which are exact numbers up to 2^24, their log-probabilities and the log of the rest."""
        made = self.description
        seen = logits.of_first(made.vocab_size).at_temperature(made.kd_temperature)
        ids_TK = seen.top(made.top_k)
        return ids_TK, seen.log_probabilities(ids_TK), seen.log_rest(ids_TK).unsqueeze(-1)

    def _keep(self, found_BSW: np.ndarray, start: int, dp: int) -> None:
        """Write what data ranks found of the rows from `start` on."""
        batch, width, finished = self.settings.batch, self.description.top_k, [[] for _ in self.datasets]
        of_rank = found_BSW.reshape(dp, -1, *found_BSW.shape[1:])
        for rank, found in enumerate(of_rank):
            numbers = sample_indices(start, batch.global_batch_size, batch.micro_batch_size, rank, dp)
            for number, found_SW in zip(numbers, found):
                labels_NW = found_SW[self.rows[number]["loss_mask"].numpy() != 0]
                for source, sample in self.rows.samples_in(number):
                    dataset = self.datasets[source]
                    own = int(dataset.starts[sample + 1] - dataset.starts[sample])
                    part, labels_NW = labels_NW[:own], labels_NW[own:]
                    dataset.keep(sample, part[:, :width], part[:, width:-1], part[:, -1])
                    finished[source].append(sample)
        for dataset, samples in zip(self.datasets, finished):
            dataset.finish(samples)


def datasets_of(kept: LogitCacheSettings, description: Description, prepared: Prepared) -> tuple[CachedDataset, ...]:
    return tuple(CachedDataset(kept.output, description, prefix, dataset_key(prefix)) for prefix in prepared.prefixes)
