"""The rows of an epoch, by number: what data/batches.py reads global batches from."""

from megatron_deepseek.finetuning.prepare import Prepared


class Rows:
    """Rows of --seq-length: row n is in epoch n // rows_per_epoch. Each sample is once in an epoch, none is lost.

    An epoch takes the same rows in the order of a permutation drawn from (seed, epoch), so what a run reads depends on
    the number of consumed rows alone, in any layout: give it to `data.batches.Sampler`. `epochs` None goes on for
    ever; otherwise rows after the last epoch are blank (all padding, no loss), so that the last step may be partial.
    `shuffle` False (evaluation) keeps the order of the files.

    An item is a dict of tensors [seq_length] (torch): tokens int64, labels int64, loss_mask float32 (the weights),
    documents int64 (padding is a document of its own), real bool; and source int, the number of the row's dataset.
    """

    def __init__(self, prepared: Prepared, epochs: int | None = None, shuffle: bool = True):
        raise NotImplementedError

    names: tuple[str, ...]  # of the datasets; Sampler reads it
    rows_per_epoch: int
    samples_per_epoch: int
    tokens_per_epoch: int   # real ones

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, number: int) -> dict:
        raise NotImplementedError

    def steps_per_epoch(self, global_batch_size: int) -> float:
        """Return rows_per_epoch / global_batch_size; a run of `epochs` takes that times `epochs`, rounded up."""
        raise NotImplementedError

    def samples_in(self, number: int) -> list[int]:
        """Return the numbers of the samples in a row, for tests and for held-out prompts."""
        raise NotImplementedError
