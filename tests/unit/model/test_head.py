"""The output head against torch's own softmax over whole logits, in float64, with and without chunks of tokens."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import V3_SMALL, forward, gradients_of, random_batch, whole_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from megatron_deepseek.model.head import OutputHead, default_chunk_size
from megatron_deepseek.ops.precision_recipe import Linear
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary_chunks import rows_of_a_block
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits
from megatron_deepseek.parallel.zero_bubble import DeferredGradients, defer_weight_gradients
from megatron_deepseek.settings import LossSettings

B, S, H, V, K = 2, 5, 6, 11, 3
CHUNK_SIZES = (None, 1, 3, 5, 9, 10)  # of 10 tokens: one chunk, one token each, one left over, parts of rows, one chunk


@pytest.fixture
def tp(meshes) -> TensorParallel:
    return TensorParallel(meshes.tp, sequence_parallel=False)


def states(dtype: torch.dtype = torch.float64, batch: int = B, vocabulary: int = V, scale: float = 1.0
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """State [B, S, H] and the head's weight [V, H]."""
    generator = torch.Generator().manual_seed(0)
    return tuple((scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
                 for shape in ((batch, S, H), (vocabulary, H)))


def ids(*shape: int, vocabulary: int = V) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))


def uneven(result: torch.Tensor) -> torch.Tensor:
    """A sum in which every number counts by another weight, the first not at all, as under a mask."""
    return (result * torch.linspace(0, 2, result.numel(), dtype=result.dtype).view_as(result)).sum()


def assert_same(got: torch.Tensor, expected: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    """Values, and gradients by `inputs`: float64 rounding alone."""
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients, wanted = (torch.autograd.grad(uneven(each), inputs) for each in (got, expected))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def log_softmax(state: torch.Tensor, weight: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """torch's own, of ids [B, S, K]."""
    return F.linear(state, weight).log_softmax(-1).gather(-1, of)


def forward_kl(logits, teacher_ids, teacher_log_p):
    """Of the teacher's largest K probabilities, [T]."""
    return (teacher_log_p.exp() * (teacher_log_p - logits.log_probabilities(teacher_ids))).sum(-1)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_log_probabilities(tp, chunk_size):
    (state, weight), labels = states(), ids(B, S)
    head = OutputHead(tp, lambda: weight, chunk_size=chunk_size)
    assert_same(head.log_probabilities(state, labels), log_softmax(state, weight, labels.unsqueeze(-1)).squeeze(-1),
                (state, weight))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_log_probabilities_at_a_temperature(tp, chunk_size):
    (state, weight), labels = states(), ids(B, S)
    expected = (F.linear(state, weight) / 0.6).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    head = OutputHead(tp, lambda: weight, chunk_size=chunk_size)
    assert_same(head.log_probabilities(state, labels, 0.6), expected, (state, weight))


@pytest.mark.parametrize("temperature", (1.0, 1.7))
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_log_probabilities_among_kept_ids(tp, chunk_size, temperature):
    """Of each token between one and five ids are kept, its label among them; of some tokens all: nothing but -1."""
    (state, weight), labels = states(), ids(B, S)
    order_BSV = torch.rand(B, S, V, generator=torch.Generator().manual_seed(2)).scatter(-1, labels.unsqueeze(-1), -1)
    numbers_BS1 = torch.arange(B * S).view(B, S, 1) % 6  # of kept ids, 0 for all
    kept = order_BSV.argsort(-1)[..., :5].where(torch.arange(5) < numbers_BS1, -1).flip(-1).int()
    may_BSV = torch.zeros(B, S, V + 1).scatter(-1, kept.long() % (V + 1), 1)[..., :V].bool() | (numbers_BS1 == 0)
    assert [*may_BSV.sum(-1).flatten()] == [V, 1, 2, 3, 4, 5, V, 1, 2, 3]
    logits = (F.linear(state, weight) / temperature).masked_fill(~may_BSV, -torch.inf)
    expected = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    head = OutputHead(tp, lambda: weight, chunk_size=chunk_size)
    assert_same(head.log_probabilities(state, labels, temperature, kept), expected, (state, weight))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("temperature", (1.0, 0.6))
def test_entropy(tp, chunk_size, temperature):
    state, weight = states()
    log_p = (F.linear(state, weight) / temperature).log_softmax(-1)
    got = OutputHead(tp, lambda: weight, chunk_size=chunk_size).entropy(state, temperature)
    assert_same(got, -(log_p.exp() * log_p).sum(-1), (state, weight))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_distillation(tp, chunk_size):
    (state, weight), teacher_ids = states(), ids(B, S, K)
    teacher_log_p = log_softmax(*states(scale=0.5), teacher_ids).detach()
    head = OutputHead(tp, lambda: weight, chunk_size=chunk_size)
    expected = (teacher_log_p.exp() * (teacher_log_p - log_softmax(state, weight, teacher_ids))).sum(-1)
    assert_same(head.for_chunks(state, forward_kl, teacher_ids, teacher_log_p), expected, (state, weight))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_several_results_of_which_one_has_no_gradient(tp, chunk_size):
    (state, weight), of = states(), ids(B, S, K)
    log_p, entropy, best = OutputHead(tp, lambda: weight, chunk_size=chunk_size).for_chunks(
        state, lambda logits, of: (logits.log_probabilities(of), logits.entropy(), logits.local_Tv.argmax(-1)), of)
    assert torch.equal(best, F.linear(state, weight).argmax(-1)) and entropy.shape == (B, S)
    assert_same(log_p, log_softmax(state, weight, of), (state, weight))  # and none through `entropy`


def test_an_id_that_is_ruled_out(tp):
    """A logit of -inf adds nothing to the entropy of the others, and has no gradient."""
    logits_Tv = torch.tensor([[2.0, 2.0, float("-inf"), 2.0]], requires_grad=True)
    logits = VocabularyLogits(logits_Tv, tp)
    (logits.entropy() + logits.log_probabilities(torch.tensor([1]))).sum().backward()
    torch.testing.assert_close(logits.entropy(), torch.tensor([3.0]).log())
    torch.testing.assert_close(logits_Tv.grad, torch.tensor([[-1 / 3, 2 / 3, 0.0, -1 / 3]]))


@pytest.mark.parametrize("chunk_size", (None, 3))
def test_extreme_logits(tp, chunk_size):
    """Probabilities of 0 and 1, where log p is finite, -1e4 or so, and entropy and its gradients are 0."""
    state, weight = torch.full((1, 5, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    head = OutputHead(tp, lambda: weight, chunk_size=chunk_size)
    assert head.log_probabilities(state, torch.tensor([[0, 1, 0, 1, 1]])).tolist() == [[0, -2e4, 0, -2e4, -2e4]]
    entropy = head.entropy(state)
    gradients = torch.autograd.grad(entropy.sum(), (state, weight))
    assert not entropy.any() and not any(each.any() for each in gradients)


class Products(TorchDispatchMode):
    """The shapes of matrix products, and the most elements of any tensor that is made."""

    def __init__(self):
        super().__init__()
        self.shapes, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *(leaf.numel() for leaf in made)])
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes += [tuple(leaf.shape) for leaf in made]
        return given


def backward(frozen: str, chunk_size: int, tp: TensorParallel) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """The gradient of what is not frozen, of log-probabilities and of distillation, and the products it took."""
    state, weight = states(vocabulary=13)
    free, fixed = (state, weight) if frozen == "weight" else (weight, state)
    fixed.requires_grad_(False)
    head = OutputHead(tp, lambda: weight, chunk_size=chunk_size)
    result = uneven(head.log_probabilities(state, ids(B, S)))
    result = result + uneven(head.for_chunks(state, forward_kl, ids(B, S, K), torch.zeros(B, S, K)))
    with Products() as products:
        result.backward()
    assert fixed.grad is None
    return free.grad, products.shapes


@pytest.mark.parametrize("frozen", ("weight", "state"))
def test_nothing_is_computed_for_what_is_frozen(tp, frozen):
    """Inputs come in chunks of 5 tokens; the weight's gradient in blocks of 6 rows, and whole from a function."""
    (one, products), (other, _) = backward(frozen, 5, tp), backward(frozen, 10, tp)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    of_state, of_weight = {(5, H)} & {*products}, {(6, H), (1, H), (13, H)} & {*products}
    assert (len(of_state), len(of_weight)) == ((1, 0) if frozen == "weight" else (0, 3))


@pytest.mark.parametrize("what", ("log_probabilities", "entropy", "distillation"))
def test_logits_are_never_more_than_a_chunks(tp, what):
    """No tensor has more elements than a chunk's logits: not the input, nor the weight, nor 3 ids of each token."""
    (state, weight), chunk_size = states(batch=40, vocabulary=40), 32
    head, of = OutputHead(tp, lambda: weight, chunk_size=chunk_size), ids(40, S, K, vocabulary=40)
    make = {"log_probabilities": lambda: head.log_probabilities(state, of[..., 0]), "entropy": lambda: head.entropy(
        state), "distillation": lambda: head.for_chunks(state, forward_kl, of, torch.zeros(40, S, K))}[what]
    with Products() as seen:
        make().sum().backward()
    assert seen.largest == chunk_size * 40


def test_the_backward_may_come_through_a_checkpoint(tp):
    (state, weight), labels = states(), ids(B, S)
    head = OutputHead(tp, lambda: weight, chunk_size=4)
    got = checkpoint(head.log_probabilities, state, labels, use_reentrant=False)
    assert_same(got, log_softmax(state, weight, labels.unsqueeze(-1)).squeeze(-1), (state, weight))


def test_peak_memory_at_the_size_of_v3(monkeypatch):
    """Of 4,096 tokens in bfloat16 with csrc/'s kernels: all logits are 1 GiB, and of the default chunks a quarter; the
    input's gradient and what else is there have another sixteenth. The weight's gradient comes on top, 1.73 GiB.
    """
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[3] / "benchmarks")
    from head_memory import V3, WHOLE, peak_bytes

    hidden, rows = V3
    whole, chunked = (peak_bytes(chunk_size, hidden, rows, True) - 2 * hidden * rows for chunk_size in (WHOLE, None))
    assert 2 * 4096 * rows < whole < 1.07 * 2**30
    assert 2 * 1024 * rows < chunked < 0.37 * 2**30


def test_w_gathers_the_weights_that_a_forward_in_between_has_freed(meshes):
    gradients = []
    for chunk_size in (None, 4):
        model = whole_model(V3_SMALL, meshes, 8, loss=LossSettings(loss_chunk_size=chunk_size),
                            reshard_after_forward=True)
        deferred, batch = defer_weight_gradients(model), random_batch(V3_SMALL, 2, 8)
        forward(model, *batch).loss.backward()
        finish = deferred.take()
        with torch.no_grad():
            forward(model, *batch)
        finish()
        gradients.append(gradients_of(model)["lm_head.weight"])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_the_weights_gradient_is_left_to_w(tp):
    """Nothing of it before W, all of it after; the input's is there after B, by no product."""
    (state, weight), labels, deferred = states(), ids(B, S), DeferredGradients()
    product = Linear().deferring(deferred)
    uneven(OutputHead(tp, lambda: weight, lambda: product, 4).log_probabilities(state, labels)).backward()
    assert weight.grad is None
    deferred.take()()
    expected = uneven(log_softmax(state, weight, labels.unsqueeze(-1)).squeeze(-1))
    expected = torch.autograd.grad(expected, (state, weight))
    torch.testing.assert_close((state.grad, weight.grad), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", ("log_probabilities", "distillation"))
def test_bfloat16_gradients_are_as_exact_as_without_chunks(tp, what):
    """Against float64 of the same rounded numbers. 64 chunks that were added up in bfloat16 would be off by 4 times as
    much; here the error is that of rounding each logit's gradient and each result once or twice.
    """
    wide = states(batch=64, vocabulary=64)
    narrow = [each.detach().bfloat16() for each in wide]
    of = ids(64, S, K, vocabulary=64)

    def gradients(dtype, chunk_size):
        state, weight = (each.to(dtype).requires_grad_() for each in narrow)
        head = OutputHead(tp, lambda: weight, chunk_size=chunk_size)
        result = head.log_probabilities(state, of[..., 0]) if what == "log_probabilities" else head.for_chunks(
            state, forward_kl, of, torch.zeros(64, S, K))
        return torch.autograd.grad(result.sum(), (state, weight))

    exact, whole, chunked = (gradients(*each) for each in ((torch.float64, None), (torch.bfloat16, None),
                                                           (torch.bfloat16, 5)))
    for one, other, reference in zip(chunked, whole, exact, strict=True):
        error, usual = ((each.double() - reference).norm() / reference.norm() for each in (one, other))
        assert error < 1.3 * usual, (error, usual)


def test_sizes():
    """V3's head in bfloat16: 1,024 tokens; a small model's logits are never cut."""
    assert default_chunk_size(129280, torch.bfloat16) == 1024
    assert default_chunk_size(129280 // 8, torch.bfloat16) == 8192
    assert default_chunk_size(4096, torch.float32) == 16384
    assert rows_of_a_block(4096, 129280, 1024) == 32256 <= 129280 / 4
    assert rows_of_a_block(10, 11, 3) == 3 and rows_of_a_block(100, 11, 1) == 1
