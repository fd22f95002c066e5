"""Packed documents: each gets the loss and the gradients that it would have had alone.

The rotary table is float32, so that the same distance at another place differs by its rounding: CLOSE. A score too many
changes results by more than 1e-3.
"""

from dataclasses import replace

import pytest
import torch
from small_models import V3_SMALL, enliven, gradients_of, relative_error, whole_stage

from megatron_deepseek.data.batches import number_documents
from megatron_deepseek.model.build import Precision
from megatron_deepseek.model.deepseek import shifted_labels
from megatron_deepseek.settings import OptimizerSettings
from megatron_deepseek.training.trainer import Plan, Trainer

CONFIG = replace(V3_SMALL, num_nextn_predict_layers=2)
CLOSE = 1e-6
LENGTH = 8


def trainer(meshes) -> Trainer:
    made = Trainer(Plan(CONFIG, (whole_stage(CONFIG),), "1F1B", LENGTH, micro_batch_size=1,
                        precision=Precision(torch.float64), optimizer=OptimizerSettings(clip_grad=0.0)), meshes)
    enliven(made.stages[0])
    return made


def test_number_documents():
    """The token that ends a document is its last."""
    tokens = torch.tensor([[5, 9, 5, 9, 9, 5], [9, 5, 5, 5, 5, 5]])
    assert number_documents(tokens, 9).tolist() == [[0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1]]


def test_mtp_labels_stop_where_a_document_does():
    labels, mask = torch.arange(1, 7).unsqueeze(0), torch.ones(1, 6, dtype=torch.bool)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    _, masks = shifted_labels(labels, mask, 7, documents)
    assert masks[0, :3].int().tolist() == [[1] * 6, [1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert not masks[0, 3:].any()


@pytest.mark.parametrize("lengths", [(3, 5), (1, 4, 2, 1)])
def test_packed_documents_train_as_if_alone(meshes, lengths):
    """A row of documents against a row for each of them, padded behind: no label counts there, no expert gets it."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(1, CONFIG.vocab_size, (1, LENGTH + 1), generator=generator)
    tokens, labels = row[:, :-1], row[:, 1:]
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)
    alone, begin = [], 0  # a document's last label is the next one's first token, as in packed rows
    for length in lengths:
        pad = (0, LENGTH - length)
        part = slice(begin, begin + length)
        alone.append([torch.nn.functional.pad(x[0, part], pad) for x in (tokens, labels, torch.ones_like(tokens))])
        begin += length
    rows = [torch.stack(parts) for parts in zip(*alone)]

    packed, single = trainer(meshes), trainer(meshes)
    found = packed.train_step(tokens, labels, torch.ones(1, LENGTH, dtype=torch.bool), 0.0, documents_BS=documents)
    expected = single.train_step(rows[0], rows[1], rows[2].bool(), 0.0, real_BS=rows[2].bool())
    assert found.losses.lm_loss == pytest.approx(expected.losses.lm_loss, rel=CLOSE)
    assert found.losses.mtp_loss == pytest.approx(expected.losses.mtp_loss, rel=CLOSE)
    for layer, counts_E in found.expert_counts.items():
        assert torch.equal(counts_E, expected.expert_counts[layer]), layer
    wanted = gradients_of(single.stages[0])
    errors = {name: relative_error(g, wanted[name]) for name, g in gradients_of(packed.stages[0]).items()}
    assert max(errors.values()) < CLOSE, errors
