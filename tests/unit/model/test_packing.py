"""Packed documents: each gets the loss and the gradients that it would have had alone.

Alone is not ours: a plain float64 model (reference_model.py) or transformers' is given one document after the other.
transformers' rotary table is float32, so that the same distance at another place differs by its rounding: CLOSE. A
score too many changes results by more than 1e-3.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reference_model import ReferenceModel
from reference_routing import balance_loss, choose
from small_models import V3_SMALL, enliven, gradients_of, load, relative_error, training_batch, weights_of, whole_stage
from test_parity import GRADIENT, V2, V3, theirs

from megatron_deepseek.data.batches import number_documents
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.model.shifts import shifted_labels
from megatron_deepseek.ops import documents
from megatron_deepseek.settings import LossSettings, OptimizerSettings
from megatron_deepseek.training.trainer import TrainingSpec, Trainer

DEPTHS = 2
CONFIG = replace(V3_SMALL, num_nextn_predict_layers=DEPTHS)
MOE_LAYERS = [layer for layer in range(CONFIG.num_hidden_layers + DEPTHS) if CONFIG.is_moe_layer(layer)]
MTP_SCALE, BALANCE = 0.3, 0.1
CLOSE = 1e-6
LENGTH = 8


def trainer(config: ModelConfig, meshes, dtype: torch.dtype = torch.float64, balance: str = "none") -> Trainer:
    loss = LossSettings(mtp_loss_scaling_factor=MTP_SCALE, balance_type=balance, moe_aux_loss_coeff=BALANCE)
    made = Trainer(TrainingSpec(config, (whole_stage(config),), "1F1B", LENGTH, micro_batch_size=1,
                        build=BuildOptions(precision=Precision(dtype), loss=loss),
                        optimizer=OptimizerSettings(clip_grad=0.0)), meshes)
    enliven(made.stages[0])
    return made


@pytest.fixture(scope="module")
def packing(meshes) -> Trainer:
    """Takes any number of steps without moving, at a learning rate of 0."""
    return trainer(CONFIG, meshes, balance="seq_aux_loss")


def test_number_documents():
    """The token that ends a document is its last."""
    tokens = torch.tensor([[5, 9, 5, 9, 9, 5], [9, 5, 5, 5, 5, 5]])
    assert number_documents(tokens, 9).tolist() == [[0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1]]


EOD = 9
ROWS = ([5, 9, 5, 9, 9, 5], [9, 5, 5, 5, 5, 5], [5, 5, 5, 5, 5, 9], [9] * 6, [9, 9, 5, 5, 9, 9], [5] * 6)


@pytest.mark.parametrize("reset_positions", [False, True])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_documents_are_those_of_megatron(row, reset_positions):
    """Who sees whom under its --reset-attention-mask. With --reset-position-ids too, the distances between those, which
    are all that rotary embeddings ask of positions, stay what they are without.
    """
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    tokens_S = torch.tensor(row)
    hidden_1SS, _, positions_S = _get_ltor_masks_and_position_ids(tokens_S, EOD, reset_positions, True, False, True)
    documents_S = number_documents(tokens_S[None], EOD)[0]
    sees_SS = (documents_S[:, None] == documents_S) & torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(sees_SS, ~hidden_1SS[0])
    distances_SS, theirs_SS = (x[:, None] - x for x in (torch.arange(6), positions_S))
    assert torch.equal(distances_SS[sees_SS], theirs_SS[sees_SS])


def test_mtp_labels_stop_where_a_document_does():
    labels, mask = torch.arange(1, 7).unsqueeze(0), torch.ones(1, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    _, masks = shifted_labels(labels, mask, 7, documents)
    assert masks[0, :3].int().tolist() == [[1] * 6, [1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert not masks[0, 3:].any()


@dataclass(frozen=True)
class Document:
    """Its row, its tokens and the one after them, which is the last one's label, and which of its labels count."""

    row: int
    tokens_L: torch.Tensor
    mask_S: torch.Tensor


def documents_of(ids_BL: torch.Tensor, mask_BS: torch.Tensor, lengths: tuple[tuple[int, ...], ...]) -> list[Document]:
    found = []
    for row, of_row in enumerate(lengths):
        begin = 0
        for length in of_row:
            found.append(Document(row, ids_BL[row, begin:begin + length + 1], mask_BS[row, begin:begin + length]))
            begin += length
    return found


@dataclass(frozen=True)
class Alone:
    """What documents one by one add up to: the mean loss of each depth, the balance loss of the rows they stand in, and
    how often each layer chose each expert.
    """

    losses: list[torch.Tensor]
    balance: torch.Tensor
    counts: list[list[int]]

    @property
    def total(self) -> torch.Tensor:
        return self.losses[0] + MTP_SCALE / DEPTHS * sum(self.losses[1:]) + self.balance


def one_by_one(model: ReferenceModel, documents: list[Document], num_rows: int) -> Alone:
    """Depth k of a document predicts from its tokens i and i + k; a position without token i + k is not routed."""
    losses, labels = [torch.zeros(())] * (1 + DEPTHS), [0] * (1 + DEPTHS)
    routed: dict[tuple[int, int], list[torch.Tensor]] = {}  # by layer and row
    for document in documents:
        for depth, (loss_T, counted_T) in enumerate(token_losses(model, document)):
            losses[depth] = losses[depth] + (loss_T * counted_T).sum()
            labels[depth] += int(counted_T.sum())
        for layer, scores_1SE in zip(MOE_LAYERS, model.scores, strict=True):
            depth = max(0, layer - CONFIG.num_hidden_layers + 1)
            own = scores_1SE[0, :max(0, len(document.mask_S) - depth)]
            routed.setdefault((layer, document.row), []).append(own)
    rows = {key: torch.cat(parts) for key, parts in routed.items()}
    balance = sum(balance_loss(scores_TE, CONFIG, BALANCE) for scores_TE in rows.values() if len(scores_TE))
    return Alone([loss / max(count, 1) for loss, count in zip(losses, labels)], torch.as_tensor(balance) / num_rows,
                 [chosen(model, layer, [row for key, row in rows.items() if key[0] == layer]) for layer in MOE_LAYERS])


def token_losses(model: ReferenceModel, document: Document):
    """Of each depth the losses of a document's predictions, and which of them count."""
    length = len(document.mask_S)
    for depth, logits_1SV in enumerate(model.logits(document.tokens_L[None], length)):
        predicted = max(0, length - depth)
        yield (F.cross_entropy(logits_1SV[0, :predicted], document.tokens_L[1 + depth:][:predicted], reduction="none"),
               document.mask_S[depth:])


def chosen(model: ReferenceModel, layer: int, rows: list[torch.Tensor]) -> list[int]:
    """How often each expert of a layer was, of the scores [T, E] of each row."""
    bias = model.weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"].tolist()
    found = Counter(expert for scores_TE in rows for scores_E in scores_TE.tolist()
                    for expert in choose(scores_E, bias, CONFIG))
    return [found[expert] for expert in range(CONFIG.n_routed_experts)]


@st.composite
def packings(draw) -> tuple[tuple[int, ...], ...]:
    """Lengths of the documents of one row or two; what they leave of a row is padding, which may be all of it."""
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        filled = draw(st.sampled_from((LENGTH, LENGTH, LENGTH - 3, 1, 0)))
        ends = sorted(draw(st.sets(st.integers(1, filled - 1)))) if filled > 1 else []
        rows.append(tuple(end - begin for begin, end in zip([0, *ends], [*ends, filled])) if filled else ())
    return tuple(rows)


def numbers_of(lengths: tuple[tuple[int, ...], ...], padding_is_own: bool) -> torch.Tensor | None:
    """[B, S]: padding is a document of its own, or a part of the last one; none of rows that are one document."""
    numbers = torch.zeros(len(lengths), LENGTH, dtype=torch.int64)
    for row, of_row in zip(numbers, lengths):
        for end in accumulate(of_row if padding_is_own else of_row[:-1]):
            row[end:] += 1
    return numbers if numbers.any() else None


@settings(max_examples=8, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=packings(), seed=st.integers(0, 99), all_labels=st.booleans(), padding_is_own=st.booleans())
@example(lengths=((1,) * LENGTH,), seed=0, all_labels=True, padding_is_own=True)
@example(lengths=((1, 1, DEPTHS, DEPTHS + 1), ()), seed=1, all_labels=True, padding_is_own=False)
@example(lengths=((DEPTHS,), (LENGTH,)), seed=2, all_labels=False, padding_is_own=False)
def test_packed_documents_train_as_if_alone(packing, lengths, seed, all_labels, padding_is_own):
    """Documents of any length, some shorter than MTP reaches, labels that do not count, rows and micro-batches (a row
    each) of nothing but padding.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(CONFIG.vocab_size, (len(lengths), LENGTH + 1), generator=generator)
    real_BS = torch.arange(LENGTH) < torch.tensor([sum(of_row) for of_row in lengths])[:, None]
    mask_BS = real_BS & (torch.rand(real_BS.shape, generator=generator) < (1.0 if all_labels else 0.6))
    found = packing.train_step(training_batch(ids_BL[:, :-1], ids_BL[:, 1:], mask_BS, real_BS=real_BS,
                                              documents_BS=numbers_of(lengths, padding_is_own)), 0.0)

    model = packing.stages[0]
    table_2SD = rope_table(CONFIG, LENGTH, torch.device("cpu"), torch.float64)
    reference = ReferenceModel(CONFIG, weights_of(model), table_2SD, CONFIG.qk_head_dim**-0.5)
    alone = one_by_one(reference, documents_of(ids_BL, mask_BS, lengths), max(1, sum(map(bool, lengths))))
    assert [found.losses.lm_loss, *found.losses.mtp_loss] == pytest.approx([x.item() for x in alone.losses], rel=CLOSE)
    assert found.losses.balance_loss == pytest.approx(alone.balance.item(), rel=CLOSE)
    assert [counts_E.tolist() for counts_E in found.expert_counts.values()] == alone.counts
    if alone.total.requires_grad:
        alone.total.backward()
    wanted = reference.gradients()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in gradients_of(model).items():
        assert (gradient - wanted[name]).abs().max() <= CLOSE * max(wanted[name].abs().max(), 1e-3 * largest), name


def test_a_document_in_two_pieces_is_refused_before_sequences_are_divided(packing):
    ids_BS, mask_BS = torch.zeros(2, LENGTH, dtype=torch.int64), torch.ones(2, LENGTH, dtype=torch.bool)
    pieces_BS = torch.tensor([[0] * LENGTH, [1, 1, 2, 2, 1, 1, 3, 3]])
    with pytest.raises(ValueError, match=r"not in one piece: \[1, 2, 1, 3\]"):
        packing.train_step(training_batch(ids_BS, ids_BS, mask_BS, documents_BS=pieces_BS), 0.0)


@pytest.mark.parametrize("fields", [V2, V3], ids=["v2", "v3"])
def test_packed_documents_train_as_in_transformers(meshes, fields):
    """Main loss and gradients; transformers is given a document at a time, and computes in float32."""
    reference = theirs(fields)
    enliven(reference)
    config = ModelConfig.from_hf_dict(reference.config.to_dict())
    packed = trainer(config, meshes, torch.float32)
    load(packed.stages[0], {name: weight for name, weight in weights_of(reference, torch.float32).items()
                            if weight.numel()})
    lengths = ((3, 1, 4), (1, 1, 6))
    ids_BL = torch.randint(config.vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.8
    numbers = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(of_row)) for of_row in lengths])
    found = packed.train_step(training_batch(ids_BL[:, :-1], ids_BL[:, 1:], mask_BS, documents_BS=numbers), 0.0)
    loss = 0
    for document in documents_of(ids_BL, mask_BS, lengths):
        logits_SV = reference(document.tokens_L[None, :-1]).logits[0]
        loss += (F.cross_entropy(logits_SV, document.tokens_L[1:], reduction="none") * document.mask_S).sum()
    loss = loss / mask_BS.sum()
    loss.backward()
    assert found.losses.lm_loss == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, gradient in gradients_of(packed.stages[0]).items():
        if expected[name] is not None and expected[name].abs().max() > 0:
            assert relative_error(gradient, expected[name]) < GRADIENT, name


@pytest.mark.parametrize("steps", [1, 3])
def test_documents_are_found_once_a_batch(meshes, steps, monkeypatch):
    """Not once for each layer, forward or backward: each row is walked once a step."""
    walked, find = [], documents.documents_of
    monkeypatch.setattr(documents, "documents_of", lambda row_S: walked.append(row_S) or find(row_S))
    made = trainer(CONFIG, meshes)
    ids_BL = torch.randint(CONFIG.vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    numbers_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [0] * 8])
    batch = training_batch(ids_BL[:, :-1], ids_BL[:, 1:], torch.ones(2, LENGTH), documents_BS=numbers_BS)
    for _ in range(steps):
        made.train_step(batch, learning_rate=0.0)
    assert len(walked) == 2 * steps
