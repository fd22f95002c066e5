"""A model in training that is asked, on one process: of a row only the continuation counts.

tests/parallel/test_reading_rows.py compares layouts with one process.
"""

import pytest
from small_trainers import SEQ_LENGTH, trainer

from megatron_deepseek.data.tokenizer import ByteTokenizer
from megatron_deepseek.evaluation.questions import Continuation, Generation, Score
from megatron_deepseek.evaluation.trained_model import TrainedModel
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.training.reading_rows import continue_rows, score_rows

ROW = (3, 1, 4, 1, 5, 9, 2)


def test_answers_are_of_the_continuation_alone(meshes):
    made = trainer(meshes)
    (values, _), = score_rows(made, [ROW])
    (tokens,) = continue_rows(made, [ROW[:2]], [3], lambda number, tokens: False)
    likely = Continuation(ROW[:2], tuple(tokens[:2]))
    model = TrainedModel(made, ByteTokenizer())
    with model.asking():
        found = dict(model.answers([Continuation(ROW[:5], ROW[5:]), Continuation((8, *ROW[:5]), ROW[5:]), likely,
                                    Generation(ROW[:2], SamplingParameters(max_tokens=3))]))
    assert found[0].log_probability == pytest.approx(sum(values[-2:])) and isinstance(found[0], Score)
    assert found[1].log_probability == pytest.approx(found[0].log_probability)  # of 8 tokens 7 fit
    assert len(ROW) == SEQ_LENGTH + 1 and found[2].greedy and not found[0].greedy
    assert found[3] == [tokens]
