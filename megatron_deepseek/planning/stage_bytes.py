"""What one micro-batch takes on one pipeline stage: its layers by their modes, the head, what stages pass on.

A stage begins with what it received and ends with what it passes on. `receive_buffers` counts what has arrived and is
not yet computed; from then on it is the input of the stage's first layer.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.planning.activations import embedding, norm, total
from megatron_deepseek.planning.arrivals import most_waiting, one_each
from megatron_deepseek.planning.head import chunk_of, head, head_backward, head_forward
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.layer_bytes import layer_bytes
from megatron_deepseek.planning.layer_shapes import LayerShapes
from megatron_deepseek.planning.replay import StageBytes
from megatron_deepseek.planning.held_parameters import Held, held_parameters


@dataclass(frozen=True)
class StageMemory:
    """`replayed` is what replay.py takes; `host` is what a micro-batch has in the host's memory."""

    replayed: StageBytes
    host: float


def states_after(job: Job, stage: int) -> int:
    """Return how many states of each token a stage passes on: the main one, and those of MTP depths so far."""
    return 1 + sum(len(each.mtp) for each in job.stages[:stage + 1])


def stage_bytes(job: Job, stage: int, shapes: LayerShapes) -> StageMemory:
    """Return what a micro-batch takes on `stage`.

    What a layer needs while it runs is there together with what the layers before it keep, and not with what those
    behind it keep: in a forward that is not made yet, in a backward it is free again, but for what waits for weight
    gradients.
    """
    indices = job.layers_of(stage)
    layers = [layer_bytes(shapes, index, mode) for index, mode in zip(indices, job.modes_of(stage))]
    behind = sum(size for _, size in beside_layers(job, stage, shapes))
    forward = backward = 0.0
    if job.stages[stage].loss and job.engine.logit_bytes is None:
        chunk = chunk_of(shapes, job.settings.loss.loss_chunk_size)
        forward, backward = head_forward(shapes, chunk), head_backward(shapes, chunk)
    waiting, (of_head, added) = head_waiting(job, stage, shapes), _outer_gradients(job, stage)
    for index, each in zip(reversed(indices), reversed(layers)):
        forward = max(forward, each.forward - behind)
        for moment in each.moments:
            left = moment.left if job.splits_backwards else _weight_gradient(job, index, moment.of_mlp)
            backward = max(backward, moment.bytes + left + of_head - behind + waiting)
        behind += each.kept
        waiting += each.waiting if job.splits_backwards else 0.0
    made = _gradients_of_stage(job, stage) if job.splits_backwards else 0.0
    backward = max(backward, max(waiting, made) + added - behind)
    return StageMemory(StageBytes(behind, waiting, forward, backward, max(0.0, made - waiting)),
                       sum(each.host for each in layers))


def beside_layers(job: Job, stage: int, shapes: LayerShapes) -> Iterator[tuple[str, float]]:
    """Yield (name, bytes) of what a stage keeps outside of its layers."""
    part, model, numbers = job.stages[stage], job.model, shapes.numbers
    hidden = numbers.plain(shapes.stream, model.hidden_size)
    if part.embedding:
        yield "rows of the vocabulary", total(embedding(shapes))
    if model.num_hidden_layers - 1 in part.layers:
        yield "input of the last norm", hidden + total(norm("", shapes.stream, numbers))
        if not shapes.gathers or model.num_nextn_predict_layers or not part.loss:
            yield "last state", hidden
    if part.loss:
        chunk, predictions = chunk_of(shapes, job.settings.loss.loss_chunk_size), 1 + model.num_nextn_predict_layers
        each = total(head(shapes, chunk, predictions)) if job.engine.logit_bytes is None else \
            shapes.whole * (model.vocab_size // job.layout.tp) * job.engine.logit_bytes
        yield "head", predictions * each
    if job.layout.pp > 1 and stage < len(job.stages) - 1 and job.engine.keeps_output:
        yield "output of the stage", states_after(job, stage) * hidden


def head_waiting(job: Job, stage: int, shapes: LayerShapes) -> float:
    """Return what the head's weight gradient waits with: its inputs, and without chunks the gradients of all logits."""
    if not (job.stages[stage].loss and job.splits_backwards):
        return 0.0
    width = job.model.hidden_size
    if chunk_of(shapes, job.settings.loss.loss_chunk_size) is None:
        width += job.model.vocab_size // job.layout.tp
    return (1 + job.model.num_nextn_predict_layers) * shapes.numbers.plain(shapes.whole, width)


def receive_buffers(job: Job, held: list[int], shapes: LayerShapes) -> float:
    """Return the bytes of the most activations and the most gradients that have arrived for the stages `held` and wait.

    Other engines have one of each kind for a stage.
    """
    if job.layout.pp == 1:
        return 0.0
    state = shapes.numbers.plain(shapes.stream, job.model.hidden_size)
    waiting = most_waiting(job.schedule, job.layout.pp, job.virtual_stages, job.micro_batches) \
        if job.engine.receives_early else one_each(len(job.stages))
    return state * sum(waiting.get(("F", stage), 0) * states_after(job, stage - 1)
                       + waiting.get(("B", stage), 0) * states_after(job, stage) for stage in held)


def terms_of_stage(job: Job, stage: int, shapes: LayerShapes) -> Iterator[tuple[str, float]]:
    """Yield (name, bytes) of what a micro-batch keeps on `stage`: layers of a kind together, and the rest."""
    found: dict[str, float] = defaultdict(float)
    for index, mode in zip(job.layers_of(stage), job.modes_of(stage)):
        found[kind_of(job, index)] += layer_bytes(shapes, index, mode).kept
    for name, size in beside_layers(job, stage, shapes):
        found[name] += size
    yield from found.items()


def kind_of(job: Job, index: int) -> str:
    """Return what the activations of a layer are called in a sum over equal ones."""
    if index >= job.model.num_hidden_layers:
        return "activations of MTP"
    return f"activations of {'MoE' if job.model.is_moe_layer(index) else 'dense'} layers"


def _outer_gradients(job: Job, stage: int) -> tuple[float, float]:
    """Return the bytes of the head's weight gradient, which is there from the head's backward to the end of the
    stage's; and what is there at that end, where FSDP adds the gradients of embedding and head to their sums: both in
    the layers' dtype, and one of them in the sums'.
    """
    part, element, frozen = job.stages[stage], job.numbers.element, job.settings.run.freeze_parameters
    if not job.engine.gradient_apart or job.frozen_base or job.splits_backwards:
        return 0.0, 0.0
    each = [held_parameters(job.model, job.layout, [Stage(part.embedding and first, (), (), part.loss and not first)],
                            frozen).dense for first in (True, False)]
    sums = job.engine.gradient if job.micro_batches > 1 and element < job.engine.gradient else 0
    return element * each[1], element * sum(each) + sums * max(each)


def _weight_gradient(job: Job, index: int, of_mlp: bool) -> float:
    """Return the bytes of a layer's weight gradients before they are added to the sums of all micro-batches: those of
    its MLP while that is at work, then those of all but routed experts, whose unit of FSDP comes to its end before.
    """
    if not job.engine.gradient_apart or job.frozen_base:
        return 0.0
    held = _parameters(job.model, job.layout, index)
    if not of_mlp:
        return job.numbers.element * held.dense
    moe, model = job.model.is_moe_layer(index), job.model
    width = model.n_shared_experts * model.moe_intermediate_size if moe else model.intermediate_size
    return job.numbers.element * (held.experts + 3 * model.hidden_size * width // job.layout.tp)


def _gradients_of_stage(job: Job, stage: int) -> float:
    """Return the bytes of all weight gradients of a stage, which are added to the sums when the last one is made."""
    if not job.engine.gradient_apart or job.frozen_base:
        return 0.0
    held = held_parameters(job.model, job.layout, [job.stages[stage]], job.settings.run.freeze_parameters)
    return job.numbers.element * (held.dense + held.experts)


@lru_cache(256)
def _parameters(model: ModelConfig, layout: Layout, index: int) -> Held:
    depth = index - model.num_hidden_layers
    part = Stage(False, (), (depth,), False) if depth >= 0 else Stage(False, (index,), (), False)
    return held_parameters(model, layout, [part])
