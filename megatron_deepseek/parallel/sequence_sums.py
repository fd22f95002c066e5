"""Sums along sequences whose tokens lie on several ranks, with their gradients.

The loss of the whole job is the sum of what every context rank contributes. A term made of single tokens is on the rank
that holds them. A term made of a sum over a row (a sum of log-probabilities, say) needs all the ranks that share the
row: each gets the whole sum and computes the whole term, and `share` then takes an equal part of it from each. So the
gradient of a sum is the sum of the gradients on all these ranks.

Shapes: B rows, S tokens of each on this rank, D documents of the row that has most.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_deepseek.device import send
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.collectives import all_reduce, sum_alike, sum_gradients


@dataclass(frozen=True, eq=False)
class SequenceSums:
    """Sums over whole rows and documents.

    `positions_S` are the positions of this rank's tokens in the whole sequences, which the ranks of `group` share; both
    are None where this rank has whole sequences. Without `documents` each row is one.
    """

    documents: Documents | None = None
    positions_S: torch.Tensor | None = None
    group: dist.ProcessGroup | None = None

    def per_row(self, x_BS: torch.Tensor) -> torch.Tensor:
        """Return the sum of each row over all its tokens, [B], whole on every rank that shares the rows."""
        return self.over_ranks(x_BS.sum(1))

    def per_document(self, x_BS: torch.Tensor) -> torch.Tensor:
        """Return the sum of each document over all its tokens, [B, D]; 0 behind a row's last document."""
        if self.documents is None:
            return self.per_row(x_BS).unsqueeze(1)
        sums_BD = x_BS.new_zeros(x_BS.shape[0], self.documents.most)
        return self.over_ranks(sums_BD.scatter_add(1, self._own_places(x_BS.device), x_BS))

    def of_documents(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Return for each of this rank's tokens what x has of its document, [B, S]; [B, 1] where rows are documents."""
        return x_BD if self.documents is None else x_BD.gather(1, self._own_places(x_BD.device))

    def _own_places(self, device: torch.device) -> torch.Tensor:
        """Return the document of each of this rank's tokens, counted from 0 within its row."""
        places_BS = self.documents.places_BS
        return send(places_BS if self.positions_S is None else places_BS[:, self.positions_S], device)

    def later(self, x_BS: torch.Tensor, by: int) -> torch.Tensor:
        """Return what x has `by` tokens later in the row, on whichever rank that is; 0 behind the row's end."""
        if self.group is None:
            return F.pad(x_BS[:, by:], (0, min(by, x_BS.shape[1])))
        positions_S = send(self.positions_S, x_BS.device)
        whole_BS = x_BS.new_zeros(x_BS.shape[0], x_BS.shape[1] * self.group.size() + by)
        whole_BS[:, positions_S] = x_BS
        return all_reduce(whole_BS, self.group)[:, positions_S + by]

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the sum of `x`, a scalar, where every rank that shares the rows made the same."""
        return x.sum() / (1 if self.group is None else self.group.size())

    def over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x over the ranks that share the rows; each computes with the sum, so the gradients are summed as well."""
        return x if self.group is None else sum_gradients(sum_alike(x, self.group), self.group)
