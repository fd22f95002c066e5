"""Divergences over a vocabulary that two ranks share, and what they need of it, against the whole on one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_deepseek.fine_tuning_settings import DistillationSettings
from megatron_deepseek.finetuning.distillation.losses import divergence_of, divergence_of_top
from megatron_deepseek.finetuning.distillation.teacher import head_rows
from megatron_deepseek.model.head import OutputHead
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary_divergence import vocabulary_divergence
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits

T, V, KNOWN, K, H = 5, 12, 9, 4, 3
SETTINGS = DistillationSettings(Path("nowhere"), kd_temperature=1.5, kd_jsd_beta=0.3)


def logits_of(seed: int, columns: int = V) -> torch.Tensor:
    return 3 * torch.randn(T, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def on_rank(loss: str) -> dict[str, torch.Tensor]:
    """Of padded logits: the divergence, that of K ids, both gradients of this rank's columns, ids and the rest."""
    tp = TensorParallel(build_meshes(Layout(tp=2), torch.device("cpu")).tp, sequence_parallel=False)
    divergence = divergence_of(replace(SETTINGS, kd_loss=loss))
    own = logits_of(1).chunk(2, 1)[tp.rank].clone().requires_grad_()
    student, teacher = (VocabularyLogits(each, tp).of_first(KNOWN).at_temperature(1.5)
                        for each in (own, logits_of(2).chunk(2, 1)[tp.rank]))
    ids = teacher.top(K)
    known = ids, teacher.log_probabilities(ids), teacher.log_rest(ids)
    found = {"whole": vocabulary_divergence(student, teacher, divergence),
             "top": divergence_of_top(student, *known, divergence)}
    weights = torch.linspace(0, 1, T, dtype=torch.float64)
    gradients = {f"gradient of {name}": torch.autograd.grad((each * weights).sum(), own, retain_graph=True)[0]
                 for name, each in found.items()}
    everything = found | gradients | dict(zip(("ids", "log_q", "rest"), known))
    return {name: each.detach() for name, each in everything.items()}


def alone(loss: str) -> dict[str, torch.Tensor]:
    """The same with torch's own functions; of the K ids with "another one" beside them."""
    student = logits_of(1).requires_grad_()
    log_p, log_q = (F.log_softmax(each[:, :KNOWN] / 1.5, -1) for each in (student, logits_of(2)))
    top, ids = log_q.topk(K)
    few = [torch.cat([each.gather(-1, ids), (1 - each.gather(-1, ids).exp().sum(-1, keepdim=True)).log()], -1)
           for each in (log_p, log_q)]
    divergence = divergence_of(replace(SETTINGS, kd_loss=loss))
    found = {"whole": divergence.terms(log_p, log_q).sum(-1), "top": divergence.terms(*few).sum(-1)}
    weights = torch.linspace(0, 1, T, dtype=torch.float64)
    gradients = {f"gradient of {name}": torch.autograd.grad((each * weights).sum(), student, retain_graph=True)[0]
                 for name, each in found.items()}
    return found | gradients | {"ids": ids, "log_q": top, "rest": few[1][:, -1]}


@pytest.mark.parametrize("loss", ["forward-kl", "reverse-kl", "jsd"])
def test_two_ranks_find_what_one_finds(ranks, loss):
    expected, (first, second) = alone(loss), ranks.run(2, on_rank, loss)
    for name, each in expected.items():
        found = torch.cat([first[name], second[name]], 1) if name.startswith("gradient") else first[name]
        torch.testing.assert_close(found, each.detach(), rtol=1e-10, atol=1e-12, msg=lambda text: f"{name}: {text}")
        assert name.startswith("gradient") or torch.equal(first[name], second[name]), name


def rows_on_rank(columns: int) -> torch.Tensor:
    """This rank's rows, for a student with so many on each rank, of a head of V rows."""
    tp = TensorParallel(build_meshes(Layout(tp=2), torch.device("cpu")).tp, sequence_parallel=False)
    own = torch.arange(V * H, dtype=torch.float64).view(V, H).chunk(2)[tp.rank]
    return head_rows(OutputHead(tp, lambda: own), columns)


@pytest.mark.parametrize("columns", [4, 6, 8])
def test_a_teachers_head_is_cut_as_the_students(ranks, columns):
    whole = torch.arange(V * H, dtype=torch.float64).view(V, H)
    expected = F.pad(whole, (0, 0, 0, max(0, 2 * columns - V)))[:2 * columns]
    assert torch.equal(torch.cat(ranks.run(2, rows_on_rank, columns)), expected)
