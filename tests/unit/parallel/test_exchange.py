"""How blocks of context-parallel ranks travel: what is begun before what is waited for, and in which numbers gradients
add up. What a rank sends and receives is played here; ranks exchange in tests/parallel.
"""

from dataclasses import dataclass, field

import pytest
import torch

from megatron_deepseek.ops.attention import LogSumExpMerge
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel import blockwise_attention, exchange
from megatron_deepseek.parallel.block_mask import BlockMask
from megatron_deepseek.parallel.blockwise_attention import KeyValueProjection
from megatron_deepseek.parallel.exchange import Gather, Ring

BF16, FLOAT32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Group:
    """Of `ranks` ranks, of which this is `own`."""

    own: int
    ranks: int

    def rank(self) -> int:
        return self.own

    def size(self) -> int:
        return self.ranks


@dataclass
class Network:
    """What happens, in order, and what was sent; every other rank's block is of ones."""

    events: list[str] = field(default_factory=list)
    sent: list[torch.Tensor] = field(default_factory=list)

    def transfer(self, block: torch.Tensor, group: Group):
        self.events.append("send")
        self.sent.append(block)
        return self

    def wait(self) -> torch.Tensor:
        self.events.append("wait")
        return torch.ones_like(self.sent[-1])


@pytest.fixture
def network(monkeypatch) -> Network:
    made = Network()
    monkeypatch.setattr(exchange, "Transfer", made.transfer)
    return made


def test_a_block_is_used_while_the_next_one_travels(network):
    for owner, _ in Ring(Group(1, 3)).blocks(torch.zeros(1)):
        network.events.append(f"use {owner}")
    assert network.events == ["send", "use 1", "wait", "send", "use 0", "wait", "use 2"]


def test_a_gradient_is_made_while_the_sum_before_it_travels(network):
    def gradients():
        for _ in range(3):
            network.events.append("make")
            yield torch.zeros(1)

    Ring(Group(1, 3)).return_gradients(gradients())
    assert network.events == ["make", "send", "make", "wait", "send", "make", "wait"]


def test_a_ring_adds_gradients_up_in_float32(network):
    """256 + 1 is no bfloat16."""
    total = Ring(Group(0, 3)).return_gradients(torch.full((2,), 256.0, dtype=BF16) for _ in range(3))
    assert [block.dtype for block in network.sent] == [FLOAT32] * 2 and network.sent[1].tolist() == [257.0] * 2
    assert total.dtype == BF16


def test_gathered_gradients_add_up_in_float32(monkeypatch):
    given = []
    monkeypatch.setattr(exchange, "reduce_scatter", lambda x, dim, group: given.append(x) or x[:1])
    total = Gather(Group(1, 2)).return_gradients(torch.full((1,), value, dtype=BF16) for value in (1.0, 2.0))
    assert given[0].dtype == FLOAT32 and given[0].tolist() == [1.0, 2.0]  # by owner; this rank's own comes last
    assert total.dtype == BF16


class Played:
    """An exchange that hands out `blocks` of every owner, and keeps nothing of their gradients but the own one."""

    def __init__(self, rank: int, blocks: list[torch.Tensor]):
        self.rank, self.others = rank, blocks

    def blocks(self, own: torch.Tensor):
        for step in range(len(self.others)):
            owner = (self.rank - step) % len(self.others)
            yield owner, own if step == 0 else self.others[owner]

    def return_gradients(self, gradients):
        return [*gradients][-1]


def test_parts_of_bfloat16_attention_are_joined_in_float32(monkeypatch):
    """8 ranks' blocks: queries' gradients are the sum of what each block gave, rounded once."""
    size, rank, length, heads, width = 8, 7, 4, 2, 8
    generator = torch.Generator().manual_seed(0)
    q, *blocks = (torch.randn(shape, generator=generator).to(BF16).requires_grad_() for shape in (
        (1, length, heads, width), *[(1, length, heads * 2 * width)] * size))
    parts, backward = [], blockwise_attention.attend_backward

    def noted(*args):
        gradients = backward(*args)
        parts.append((args[1].shape[2], gradients[0]))
        return gradients

    def project(block, owner, tokens):
        return block.unflatten(-1, (heads, 2 * width)).split(width, -1)

    monkeypatch.setattr(blockwise_attention, "attend_backward", noted)
    y = blockwise_attention.blockwise_attention(q, blocks[rank], KeyValueProjection(project, ()), 0.3,
                                                BlockMask(rank, size, length, None), Played(rank, blocks))
    y.backward(torch.randn(y.shape, generator=generator).to(BF16))
    assert len(parts) == size
    total = sum(torch.nn.functional.pad(part.float(), (0, 0, length - rows, 0)) for rows, part in parts)
    assert torch.equal(q.grad, total.to(BF16).transpose(1, 2))
    joined = LogSumExpMerge.empty(q.transpose(1, 2), width)
    assert (joined.out_BNSV.dtype, joined.lse_BNS.dtype) == (FLOAT32, FLOAT32)


def test_keys_are_made_of_what_is_seen_alone():
    """Of 8 tokens the second rank of two has 2 to 5, the first 0, 1, 6 and 7. Documents are token 0, tokens 1 and 2,
    and the rest: of the other's block one token is seen. With a document for each chunk nothing is made of it.
    """
    for documents, lengths in (([0, 1, 1, 2, 2, 2, 2, 2], [4, 1]), ([0, 0, 1, 1, 2, 2, 3, 3], [4])):
        made = []

        def project(block, owner, tokens):
            made.append(block.shape[1])
            return block.unflatten(-1, (1, 8)).split(4, -1)

        q, *blocks = (torch.randn(shape, requires_grad=True) for shape in ((1, 4, 1, 4), (1, 4, 8), (1, 4, 8)))
        block_mask = BlockMask(1, 2, 4, Documents.find(torch.tensor([documents])))
        y = blockwise_attention.blockwise_attention(q, blocks[1], KeyValueProjection(project, ()), 0.3, block_mask,
                                                    Played(1, blocks))
        y.sum().backward()
        assert made == lengths + lengths[::-1]  # forwards, and again backwards, this rank's own last
