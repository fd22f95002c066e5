"""Weights that are gathered by the layer are free again behind every act of a pipeline, and reduced gradients that go
to the host are not counted there before they have been sent.
"""

import pytest
import torch
from test_covered_plans import settings_of

from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.labels import GATHERED, TEMPORARIES
from megatron_deepseek.dry_run.rank import batch_of, dry_rank


def behind_acts(number: int, rank: int) -> list:
    settings = settings_of(number)
    found = dry_rank(DryRun(True, False, settings.layout.world_size), settings, rank)
    return [level for level in found.timeline.levels if level.act.startswith("after")]


def test_no_backward_of_a_pipeline_leaves_weights_gathered():
    """1F1B with three micro-batches, gathered by the layer."""
    levels = behind_acts(27, 1)
    assert len(levels) == 6 and all(level.categories[GATHERED] == 0 for level in levels)


def test_a_gradient_is_on_the_device_until_the_host_has_it():
    """The buffer of routed experts that is reduced: 16 of them with 3 x 7168 x 2048 weights each, in float32."""
    settings = settings_of(55)
    found = dry_rank(DryRun(True, False, settings.layout.world_size), settings, 2)
    backward = next(level for level in found.timeline.levels if level.act.startswith("B"))
    assert backward.categories[TEMPORARIES] > 16 * 3 * 7168 * 2048 * 4


@pytest.mark.parametrize("number, documents", [(5, [[0] * 4096, [0] * 2048 + [1] * 2048]), (27, None)])
def test_packed_rows_are_one_document_and_two(number, documents):
    found = batch_of(settings_of(number)).documents_BS
    assert (found if found is None else found[:2].tolist()) == documents
    assert found is None or torch.equal(found[2:], found[:-2])
