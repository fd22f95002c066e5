"""The log-probabilities that a reference model gives the answers: computed once, before training, and kept in a file.

There is no second model: before the run's own weights are loaded, those of the reference are in the trainer, which
scores what the file lacks, in whatever layout the job has. The file lies with the tokenised data; its name is a hash of
the reference's weights, the architecture and the numbers that are computed in. 8 bytes for each sample.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_deepseek.checkpoint.convert.mtp import module_prefixes
from megatron_deepseek.checkpoint.integrity import weights_identity
from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.verification import verify
from megatron_deepseek.checkpoint.loadable import checkpoint_directory, refuse_damage, stored_architecture
from megatron_deepseek.data.batches import Sampler, sample_indices
from megatron_deepseek.finetuning.preference.inputs import MismatchedRows, Sums
from megatron_deepseek.finetuning.preference.sums_file import SumsFile
from megatron_deepseek.finetuning.prepare import Prepared
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.sequence_sums import SequenceSums
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer

VERSION = 1
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Reference:
    """The reference of a run: the directory of its weights, None for the initial weights that the seed gives."""

    settings: Settings
    directory: Path | None

    @classmethod
    def of(cls, settings: Settings, origin: str | None) -> "Reference":
        """Return the reference of a run whose first start began from `origin`. Raise ValueError if it is not there."""
        if origin is None:
            return cls(settings, None)
        load, step = settings.run.load, settings.run.ckpt_step
        begun_there = load is not None and load.resolve() == Path(origin)
        return cls(settings, checkpoint_directory(Path(origin), step if begun_there else None))

    @property
    def key(self) -> str:
        """Return a hash of all that the reference's numbers depend on beside the data."""
        run, loss = self.settings.run, self.settings.loss
        decided = [VERSION, run.seed if self.directory is None else weights_identity(self.directory),
                   asdict(self.settings.model), run.bf16, run.fp8_format, run.fp8_param_gather,
                   loss.moe_expert_capacity_factor, loss.moe_token_drop_policy, loss.moe_router_force_load_balancing]
        return hashlib.sha256(json.dumps(decided, default=str).encode()).hexdigest()[:24]

    def load(self, trainer: Trainer) -> None:
        """Put the reference's weights into the trainer. All ranks call it; raise ValueError where they do not fit."""
        if self.directory is None:
            return
        refuse_damage(self.directory, verify(self.directory) or [])
        stored, model = stored_architecture(self.directory), self.settings.model
        checkpoint.load(self.directory, trainer.stages, None, module_prefixes(model, stored.num_nextn_predict_layers),
                        module_prefixes(stored, model.num_nextn_predict_layers))


class Scores:
    """The reference's sums for the samples of one prepared set; of `mismatched` answers, as KTO's KL term needs them.

    Rank 0 has the files.
    """

    def __init__(self, prepared: Prepared, reference: Reference, mismatched: bool = False):
        self.prepared, self.reference, self.mismatched = prepared, reference, mismatched
        self.rows = Rows(prepared, epochs=1, shuffle=False)
        self.files: tuple[SumsFile, ...] = ()
        if dist.get_rank() == 0:
            pairs = f"-mismatched-{prepared.settings.seed}" if mismatched else ""
            self.files = tuple(SumsFile(Path(prefix).parent / f"reference-{reference.key}{pairs}-{source}.npy",
                                        len(lengths))
                               for source, (prefix, lengths) in enumerate(zip(prepared.prefixes,
                                                                              self.rows.plan.lengths)))

    def missing_rows(self) -> list[int]:
        """Return on every rank the rows with a sample whose sum the files lack."""
        told: list = [None]
        if dist.get_rank() == 0:
            missing = [file.missing for file in self.files]
            told = [[number for number in range(self.rows.rows_per_epoch)
                     if any(missing[source][sample] for source, sample in self.rows.samples_in(number))]]
        dist.broadcast_object_list(told)
        return told[0]

    def complete(self, trainer: Trainer, missing: list[int], say: Callable[[str], None]) -> None:
        """Score the missing rows with the weights that the trainer has. All ranks call it."""
        settings = self.reference.settings
        batch, layout = settings.batch, settings.layout
        dataset = MismatchedRows(self.rows) if self.mismatched else self.rows
        sampler = Sampler(_Chosen(dataset, missing, self.rows.rows_per_epoch), settings.model.vocab_size,
                          self.prepared.settings.option)
        progress = _Progress(len(missing), say)
        for start in range(0, len(missing), batch.global_batch_size):
            own = sampler.batch(start, batch.global_batch_size, batch.micro_batch_size, trainer.meshes.rank("dp"),
                                layout.dp).to(trainer.meshes.device)
            scores_BS = trainer.score(own).log_probabilities_BS.double() * own.weights_BS
            sums_BD = SequenceSums(Documents.find(own.documents_BS)).per_document(scores_BS)
            self._keep(sums_BD.cpu().numpy(), start, batch.global_batch_size, missing, trainer)
            progress.tell(min(start + batch.global_batch_size, len(missing)))

    def _keep(self, sums_BD: np.ndarray, start: int, size: int, missing: list[int], trainer: Trainer) -> None:
        """Gather what data ranks found of the rows from `start` on, and write it. Raise ValueError for what is NaN."""
        everyone: list = [None] * trainer.meshes.layout.dp
        dist.all_gather_object(everyone, sums_BD, group=trainer.meshes.group("dp"))
        if dist.get_rank() != 0:
            return
        batch = self.reference.settings.batch
        for rank, found_BD in enumerate(everyone):
            places = sample_indices(start, size, batch.micro_batch_size, rank, len(everyone))
            for place, sums_D in zip(places, found_BD):
                here = self.rows.samples_in(missing[place]) if place < len(missing) else []
                for (source, sample), total in zip(here, sums_D):
                    self.files[source].numbers[sample] = total
        for file in self.files:
            file.flush()

    def sums(self) -> Sums:
        """Return the sums on every rank. Raise ValueError if the reference gave something that is no number."""
        told: list = [None]
        if dist.get_rank() == 0:
            told = [tuple(np.array(file.numbers) for file in self.files)]
        dist.broadcast_object_list(told)
        if not all(np.isfinite(each).all() for each in told[0]):
            raise ValueError(f"the reference model {self.reference.directory} gives answers of "
                             f"{' '.join(self.prepared.settings.dataset)} log-probabilities that are not finite")
        return told[0]


class _Chosen:
    """Some rows of a dataset as one; behind them are blank rows, which fill up the last batch."""

    def __init__(self, dataset: Rows | MismatchedRows, numbers: list[int], blank: int):
        self.dataset, self.numbers, self.blank, self.names = dataset, numbers, blank, ()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict:
        return self.dataset[self.numbers[place] if place < len(self.numbers) else self.blank]


class _Progress:
    """Says on rank 0 how far the scoring is: at its begin, now and then, and at its end."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.say, self.begun = total, say, time.monotonic()
        self.said_at = self.begun
        self._line(f"reference log-probabilities: {total:,} rows to score, once")

    def tell(self, done: int) -> None:
        now = time.monotonic()
        if done < self.total and now - self.said_at < _SECONDS_BETWEEN_LINES:
            return
        self.said_at = now
        left = (self.total - done) * (now - self.begun) / done
        self._line(f"reference log-probabilities: {done:,} of {self.total:,} rows, {left:,.0f} s left")

    def _line(self, text: str) -> None:
        if dist.get_rank() == 0:
            self.say(text)


@dataclass(frozen=True)
class ReferenceSums:
    """The reference's sums of one prepared set, of its answers and of mismatched ones, None where there are none."""

    answers: Sums | None = None
    mismatched: Sums | None = None


def reference_sums(prepared: list[Prepared], settings: Settings, trainer: Trainer, origin: str | None,
                   say: Callable[[str], None]) -> list[ReferenceSums]:
    """Return the sums of each set, from the files and, where these lack some, by the reference's weights, which stay in
    the trainer. All ranks call it. Raise ValueError for weights that cannot be loaded.
    """
    reference = Reference.of(settings, origin)
    kinds = (False, True) if settings.fine_tuning.preference.objective == "kto" else (False,)
    scores = [[Scores(each, reference, mismatched) for mismatched in kinds] for each in prepared]
    missing = [(each, rows) for of_set in scores for each in of_set if (rows := each.missing_rows())]
    if missing:
        reference.load(trainer)
    for each, rows in missing:
        each.complete(trainer, rows, say)
    return [ReferenceSums(*(each.sums() for each in of_set)) for of_set in scores]
