"""One data rank's rows of a global batch, from the loader to the stages of the model.

Shapes: B rows, S tokens of a sequence, K datasets of a blend. Rows are in the order of their micro-batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from megatron_deepseek.device import is_accelerator


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows of whole sequences. Whatever looks along a sequence is made of these before context ranks divide them.

    tokens_BS and labels_BS int64: labels_BS[:, s] is the token after tokens_BS[:, s].
    weights_BS floating point: the factor of a label in the loss; 0 for a label that is not trained on.
    documents_BS int64, always on the host: each token's document within its row; None where a row is one document.
    sources_BK bool, with one True in each row: the dataset of a blend that the row is from; None for a single dataset.
    real_BS bool: False for padding behind a row's tokens, which no expert gets; None where rows are full.
    per_token [B, S, ...] and per_row [B, ...]: what an objective asks for beyond these, by its names for them.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    weights_BS: torch.Tensor
    documents_BS: torch.Tensor | None = None
    sources_BK: torch.Tensor | None = None
    real_BS: torch.Tensor | None = None
    per_token: Mapping[str, torch.Tensor] = field(default_factory=dict)
    per_row: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        rows, whole = self.tokens_BS.shape[:1], self.tokens_BS.shape
        named = {"labels_BS": whole, "weights_BS": whole, "documents_BS": whole, "real_BS": whole, "sources_BK": rows}
        for name, shape in named.items():
            _check(name, getattr(self, name), shape)
        for extra, shape in ((self.per_token, whole), (self.per_row, rows)):
            for name, tensor in extra.items():
                _check(name, tensor, shape)
        if not self.weights_BS.is_floating_point():
            raise ValueError(f"weights_BS are {self.weights_BS.dtype}: they must be floating-point numbers, 1 for a "
                             "label that counts and 0 for one that does not")

    @property
    def num_rows(self) -> int:
        return self.tokens_BS.shape[0]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what an objective finds beyond tokens, labels and weights, by its names for them."""
        return {**self.per_token, **self.per_row}

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; documents stay on the host.

        For a CUDA device the tensors are first copied to pinned memory, unless they lie there: the host does not wait
        for copies from pinned memory.
        """
        there = self.pinned() if is_accelerator(device) else self
        moved = there._map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, documents_BS=self.documents_BS)

    def pinned(self) -> "Batch":
        """Return the batch in pinned host memory. The thread that reads ahead should call this: pinning takes time."""
        return self._map(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def rows(self, chosen: slice) -> "Batch":
        """Return some of the rows."""
        return self._map(lambda tensor: tensor[chosen])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch with every tensor changed."""
        changed = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Mapping):
                changed[each.name] = {name: change(tensor) for name, tensor in value.items()}
            elif value is not None:
                changed[each.name] = change(value)
        return Batch(**changed)


def _check(name: str, tensor: torch.Tensor | None, leading: torch.Size) -> None:
    """Raise ValueError for a tensor whose first dimensions are not those of the batch."""
    if tensor is not None and tensor.shape[:len(leading)] != leading:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)} in a batch of {tuple(leading)}")
