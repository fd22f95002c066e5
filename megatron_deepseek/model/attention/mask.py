"""What each token of a micro-batch may attend to: one object, made once per micro-batch and read by every layer.

It never becomes a tensor of ones and zeros. Kernels are started on the squares, rectangles and triangles that it names,
so nothing of the size of a squared sequence is made, and no score that is not seen is computed.
"""

from dataclasses import dataclass

from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.block_mask import BlockMask
from megatron_deepseek.parallel.context import ContextParallel


@dataclass(frozen=True, eq=False)
class CausalMask:
    """A token sees itself and the tokens before it, of its own document where rows are packed, else of its whole row.

    `documents`: those of the whole sequences, None where attention goes across documents. `blocks`: the same for the
    tokens of one context rank, as rectangles and triangles of every rank's block; None where this rank has whole
    sequences.
    """

    documents: Documents | None = None
    blocks: BlockMask | None = None

    @classmethod
    def on_rank(cls, cp: ContextParallel, seq_length: int, documents: Documents | None) -> "CausalMask":
        """Return what this context rank's tokens see of whole sequences of `seq_length` tokens."""
        return cls(documents, cp.block_mask(seq_length, documents) if cp.size > 1 else None)
