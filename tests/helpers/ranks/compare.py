"""Records of a layout's ranks against that of one process."""

from collections.abc import Iterator

import torch
from job import Record, Step

from megatron_deepseek.training.trainer import Losses

# Layouts add the same float64 numbers in another order. That was seen to change results by 1e-15 to 1e-13, the more the
# deeper the model; any real mistake, even one label or one token miscounted, changes them by more than 1e-4.
TOLERANCE = 1e-9

# Below this, an element is zero but for the rounding of terms of order one that cancelled.
ZERO = 1e-15


def differences(records: list[Record], reference: Record, tolerance: float = TOLERANCE) -> list[str]:
    """Everything in which some rank's record differs, in words; empty if the layout computes what one process does."""
    found = [f"rank {rank}: {what}" for rank, record in enumerate(records)
             for what in _record_differences(record, reference, tolerance)]
    held = {name for record in records for _, name in record.weights}
    missing = {name for _, name in reference.weights} - held
    counted = {name for record in records for name in record.steps[0].expert_counts}
    uncounted = reference.steps[0].expert_counts.keys() - counted
    return found + [f"no rank holds {name}" for name in sorted(missing)] + [
        f"no rank counts the experts of {name}" for name in sorted(uncounted)]


def _record_differences(record: Record, reference: Record, tolerance: float) -> Iterator[str]:
    for number, (step, expected) in enumerate(zip(record.steps, reference.steps, strict=True)):
        for what in _step_differences(step, expected, tolerance):
            yield f"step {number}: {what}"
    yield from (f"weight of {what}" for what in _tensor_differences(record.weights, reference.weights, tolerance))
    yield from (f"scores: {what}" for what in _score_differences(record, reference, tolerance))
    yield from (f"evaluation: {what}" for what in _loss_differences(record.evaluation, reference.evaluation, tolerance))


def _step_differences(step: Step, expected: Step, tolerance: float) -> Iterator[str]:
    yield from _loss_differences(step.losses, expected.losses, tolerance)
    if not _close(step.grad_norm, expected.grad_norm, tolerance):
        yield f"grad_norm {step.grad_norm!r}, expected {expected.grad_norm!r}"
    if step.dropped != expected.dropped:
        yield f"dropped {step.dropped!r} of all copies, expected {expected.dropped!r}"
    for name, counts in step.expert_counts.items():
        if not torch.equal(counts, expected.expert_counts[name]):
            yield f"expert counts of {name} {counts.tolist()}, expected {expected.expert_counts[name].tolist()}"
    yield from (f"gradient of {what}" for what in _tensor_differences(step.gradients, expected.gradients, tolerance))


def _score_differences(record: Record, reference: Record, tolerance: float) -> Iterator[str]:
    """Of every token, in the order of the batch; a layer's experts in any order."""
    found, wanted = record.scores, reference.scores
    tensors = {(0, "log-probabilities"): found.log_probabilities_BS}
    yield from _tensor_differences(
        tensors, {(0, "log-probabilities"): wanted.log_probabilities_BS[record.rows]}, tolerance)
    if found.experts.keys() != wanted.experts.keys():
        yield f"experts of {[*found.experts]}, expected {[*wanted.experts]}"
    for layer, experts_BSK in found.experts.items():
        if not torch.equal(experts_BSK.sort(-1).values, wanted.experts[layer][record.rows].sort(-1).values):
            yield f"other experts were chosen in {layer}"


def _loss_differences(losses: Losses, expected: Losses, tolerance: float) -> Iterator[str]:
    found = {**losses.reports, "balance_loss": losses.balance_loss}
    wanted = {**expected.reports, "balance_loss": expected.balance_loss}
    assert found.keys() == wanted.keys(), (found, wanted)
    for name, value in found.items():
        if not _close(value, wanted[name], tolerance):
            yield f"{name} is {value}, expected {wanted[name]}"
    if losses.counts != expected.counts:
        yield f"counts are {losses.counts}, expected {expected.counts}"


def _tensor_differences(tensors: dict, expected: dict, tolerance: float) -> Iterator[str]:
    """Relative to the largest element of the whole tensor: one that cancels to nothing has no digits of its own."""
    for (stage, name), tensor in tensors.items():
        wanted = expected[0, name]
        if tensor is None and wanted is None:
            continue
        if tensor is None or wanted is None or tensor.shape != wanted.shape:
            yield f"{name} (stage {stage}) is {_shape(tensor)}, expected {_shape(wanted)}"
            continue
        error, scale = (tensor - wanted).abs().max().item(), wanted.abs().max().item()
        if not error <= tolerance * scale + ZERO:
            yield f"{name} (stage {stage}) is off by {error:.2e} of {scale:.2e}"


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _close(found: float, wanted: float, tolerance: float) -> bool:
    return abs(found - wanted) <= tolerance * abs(wanted) + ZERO
