"""The samples that a data rank reads at each step: they depend on the number of consumed samples and nothing else.

A global batch is the samples [consumed, consumed + global_batch_size). Each micro-batch is a run of
micro_batch_size * dp_size of them, of which data rank r takes the r-th run of micro_batch_size. So any number of data
ranks and any micro-batch size read the same global batch.

Shapes: B rows = num_micro_batches * micro_batch_size, S = seq_length.
"""

import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.nn.functional as F

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.pretraining import check_token_ids


def sample_indices(consumed_samples: int, global_batch_size: int, micro_batch_size: int,
                   dp_rank: int, dp_size: int) -> list[int]:
    """Return the numbers of the B samples that one data rank reads, in the order of its micro-batches."""
    stride = micro_batch_size * dp_size
    if global_batch_size < 1 or global_batch_size % stride:
        raise ValueError(f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size "
                         f"{micro_batch_size} x {dp_size} data-parallel ranks")
    assert 0 <= dp_rank < dp_size
    starts = range(consumed_samples + dp_rank * micro_batch_size, consumed_samples + global_batch_size, stride)
    return [start + row for start in starts for row in range(micro_batch_size)]


class Sampler:
    """Reads global batches of a dataset by the number of consumed samples. It holds no position: the caller counts.

    The error about a token id outside `vocab_size` names the dataset: the blend's name for it, or `data_path` where
    there is no blend. `eod`, if given, ends documents that don't attend to each other; a dataset whose samples have
    `documents`, and `real` for what is no padding, says itself which these are.
    """

    def __init__(self, dataset, vocab_size: int, data_path: str, eod: int | None = None):
        self.dataset, self.vocab_size, self.data_path, self.eod = dataset, vocab_size, data_path, eod
        self.source_names = getattr(dataset, "names", ())  # of a blend

    def batch(self, consumed_samples: int, global_batch_size: int, micro_batch_size: int,
              dp_rank: int = 0, dp_size: int = 1) -> Batch:
        indices = sample_indices(consumed_samples, global_batch_size, micro_batch_size, dp_rank, dp_size)
        assert consumed_samples + global_batch_size <= len(self.dataset), "built for fewer samples than are read"
        return self._read(indices)

    def _read(self, indices: list[int]) -> Batch:
        samples = [self.dataset[index] for index in indices]
        tokens_BS = torch.stack([sample["tokens"] for sample in samples])
        labels_BS = torch.stack([sample["labels"] for sample in samples])
        for ids_BS in (tokens_BS, labels_BS):
            if ids_BS.min() < 0 or ids_BS.max() >= self.vocab_size:
                for sample, ids_S in zip(samples, ids_BS):
                    check_token_ids(ids_S, self.vocab_size, self._name(sample))
        weights_BS = torch.stack([sample["loss_mask"] for sample in samples]).float()
        documents_BS = _stacked(samples, "documents")
        if documents_BS is None and self.eod is not None:
            documents_BS = number_documents(tokens_BS, self.eod)
        sources = torch.tensor([sample["source"] for sample in samples])
        sources_BK = F.one_hot(sources, len(self.source_names)).bool() if self.source_names else None
        return Batch(tokens_BS=tokens_BS, labels_BS=labels_BS, weights_BS=weights_BS, documents_BS=documents_BS,
                     sources_BK=sources_BK, real_BS=_stacked(samples, "real"))

    def _name(self, sample: dict) -> str:
        return self.source_names[sample["source"]] if self.source_names else self.data_path

    def evaluation(self, eval_iters: int, global_batch_size: int, micro_batch_size: int,
                   dp_rank: int = 0, dp_size: int = 1):
        """Yield `eval_iters` batches, the same ones every time: the first samples of the dataset."""
        for step in range(eval_iters):
            yield self.batch(step * global_batch_size, global_batch_size, micro_batch_size, dp_rank, dp_size)

    def every_sample(self, global_batch_size: int, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1):
        """Yield batches with every sample of the dataset once. The last one is filled up with rows that are no text:
        no label of them counts, and no token of them goes to an expert.
        """
        for consumed in range(0, len(self.dataset), global_batch_size):
            indices = sample_indices(consumed, global_batch_size, micro_batch_size, dp_rank, dp_size)
            batch = self._read([index % len(self.dataset) for index in indices])
            if consumed + global_batch_size > len(self.dataset):
                real_B1 = torch.tensor([index < len(self.dataset) for index in indices])[:, None]
                batch = replace(batch, weights_BS=batch.weights_BS * real_B1,
                                real_BS=real_B1.expand_as(batch.tokens_BS).contiguous())
            yield batch


def _stacked(samples: list[dict], name: str) -> torch.Tensor | None:
    """Return what each sample has under `name`, None where the dataset has no such thing."""
    return torch.stack([sample[name] for sample in samples]) if name in samples[0] else None


def number_documents(tokens_BS: torch.Tensor, eod: int) -> torch.Tensor:
    """Return the document of each token within its row, counted from 0; an `eod` is the last token of its document."""
    ends_BS = (tokens_BS == eod).long()
    return ends_BS.cumsum(1) - ends_BS


def read_ahead(read, requests, num_workers: int = 1):
    """Yield `read(*request)` for each of `requests`; threads read the next ones while the caller works on this one.

    The order is that of `requests`, which is asked for `num_workers` elements ahead, one for each thread; with 0 the
    caller waits while it is read. An error of `read` is raised where its result would have been yielded. The threads
    end with the generator.
    """
    if num_workers == 0:
        yield from (read(*request) for request in requests)
        return
    with ThreadPoolExecutor(num_workers, "read-ahead") as pool:
        requests = iter(requests)
        reading = deque(pool.submit(read, *request) for request in itertools.islice(requests, num_workers))
        while reading:
            current = reading.popleft()
            reading.extend(pool.submit(read, *request) for request in itertools.islice(requests, 1))
            yield current.result()
