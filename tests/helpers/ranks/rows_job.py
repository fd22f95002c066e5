"""Rows through a model in training on ranks of a layout, between two of its steps."""

from dataclasses import replace

import torch
from cases import SEQ_LENGTH, Case
from job import FLOAT64, batch, make_batch, own_rows, spec_of

from megatron_deepseek.data.tokenizer import ByteTokenizer
from megatron_deepseek.evaluation.questions import Answer, Continuation, Generation, Question
from megatron_deepseek.evaluation.trained_model import TrainedModel
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.settings import PipelineSettings
from megatron_deepseek.training.trainer import Trainer

QUESTIONS = (
    Continuation((3, 1, 4), (1, 5)), Continuation((9,), (2, 6, 5, 3)),
    Generation((3, 1), SamplingParameters(max_tokens=4)),
    Continuation((5, 8, 9, 7, 9), (3, 2, 3, 8)), Generation((2, 7, 1, 8, 2, 8), SamplingParameters(max_tokens=4)),
    Continuation((4, 6, 2, 6, 4, 3, 3, 8, 3), (2, 7)), Continuation((1, 1), (1,)))


def answered(case: Case, questions: tuple[Question, ...] = QUESTIONS, alone: bool = False
             ) -> tuple[list[Answer], list[list[float]]]:
    """The answers after a step, on rank 0, and the losses of the steps; without questions the steps alone.

    `alone`: one process has the whole model and batch.
    """
    spec, layout = spec_of(case, FLOAT64), case.layout
    if alone:
        stages = resolve(case.model, PipelineSettings(), 1, SEQ_LENGTH)
        spec, layout = replace(spec, stages=stages, schedule="none"), Layout()
    meshes = build_meshes(layout, torch.device("cpu"))
    trainer = Trainer(spec, meshes)
    steps, answers = [], {}
    for number in range(2):
        rows = own_rows(make_batch(*batch(case.model, case.global_batch_size, number)), meshes)
        result = trainer.train_step(rows, learning_rate=0.1)
        steps.append([result.losses.lm_loss, *result.losses.mtp_loss, result.losses.balance_loss, result.grad_norm])
        if questions and not number:
            answers = ask(TrainedModel(trainer, ByteTokenizer()), questions)
    return [answers[number] for number in sorted(answers)], steps


def ask(model: TrainedModel, questions: tuple[Question, ...]) -> dict[int, Answer]:
    if torch.distributed.get_rank():
        model.follow()
        return {}
    with model.asking():
        return dict(model.answers(questions))
