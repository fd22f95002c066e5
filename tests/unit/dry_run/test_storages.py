"""The log of storages, by hand: what is made, kept, freed and resized in which act, and by which line."""

import torch

from megatron_deepseek.dry_run.labels import ACTIVATIONS, GRADIENTS, TEMPORARIES
from megatron_deepseek.dry_run.storages import StorageLog
from megatron_deepseek.dry_run.timeline import bytes_over_time
from megatron_deepseek.ops.norm import rms_norm
from megatron_deepseek.parallel.watch import Act


def test_bytes_of_two_acts():
    """100 floats are kept by the forward, 50 are freed in it; the backward frees what is kept after making 10."""
    log = StorageLog()
    with log.watching():
        with log(Act("F", 0, 0)):
            kept = torch.zeros(100)
            torch.zeros(50).add(1.0)  # another 50 for the sum, while the first are there
        with log(Act("B", 0, 0)):
            gradient = torch.ones(10)
            view = gradient[:5]
            del kept
        log.label(gradient, GRADIENTS)
    found = bytes_over_time(log)
    assert [(level.act, level.bytes) for level in found.levels] == [
        ("before the first act", 0), ("F0 of stage 0", 800), ("after F0 of stage 0", 400), ("B0 of stage 0", 440),
        ("after the last act", 40)]
    assert found.peak.categories[ACTIVATIONS] == 400 and found.peak.categories[TEMPORARIES] == 400
    assert found.levels[3].categories[GRADIENTS] == 40
    assert [(each.bytes, each.category) for each in found.largest] == [
        (400, ACTIVATIONS), (200, TEMPORARIES), (200, TEMPORARIES)]
    assert len(view) == 5


def test_a_storage_that_is_resized_takes_what_it_has_then():
    """As FSDP frees gathered weights and takes memory for them again."""
    log = StorageLog()
    with log.watching():
        weight = torch.zeros(8)
        with log(Act("F", 0, 0)):
            weight.untyped_storage().resize_(0)
        with log(Act("B", 0, 0)):
            weight.untyped_storage().resize_(64)
    assert [level.bytes for level in bytes_over_time(log).levels] == [32, 32, 0, 64, 64]


def test_the_line_is_the_innermost_of_the_package():
    log = StorageLog()
    with log.watching():
        kept = rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)
    made_by = [each.line for each in log.allocations if each.shape == kept.shape and each.label is None]
    assert any(line.startswith("ops/norm.py:") and line.endswith(" norm_forward") for line in made_by)
