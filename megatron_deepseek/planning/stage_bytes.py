"""What one micro-batch takes on one pipeline stage: its layers by their modes, the head, what stages pass on.

A stage begins with what it received and ends with what it passes on. `arrived` counts what has arrived and is not yet
computed; from then on it is the input of the stage's first layer.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.planning.activations import embedding, norm, total
from megatron_deepseek.planning.actions import actions, held_stages
from megatron_deepseek.planning.arrivals import waiting_in_acts
from megatron_deepseek.planning.backward_bytes import Layers, split_backwards, whole_backwards
from megatron_deepseek.planning.gathered_units import gathered_units
from megatron_deepseek.planning.stage_forward import forwards
from megatron_deepseek.planning.head import chunk_of, head, head_backward, head_forward
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.layer_bytes import LayerBytes, layer_bytes
from megatron_deepseek.planning.layer_shapes import LayerShapes
from megatron_deepseek.planning.phases import BEFORE, GATHERED, Turn
from megatron_deepseek.planning.replay import Piece, StageBytes
from megatron_deepseek.planning.stage_states import (
    gathers_ahead,
    sizes,
    states_of_phases,
    trained,
)
from megatron_deepseek.planning.trained_weights import Trained, trained_weights


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
    layers = [layer_bytes(shapes, index, mode, job.splits_backwards, _trained_of(job, stage, index, shapes))
              for index, mode in zip(indices, job.modes_of(stage))]
    beside = sum(size for _, size in beside_layers(job, stage, shapes))
    kept = beside + sum(each.kept for each in layers)
    waiting = sum(each.waiting for each in layers) + head_waiting(job, stage, shapes) if job.splits_backwards else 0.0
    backwards = split_backwards if job.splits_backwards else whole_backwards
    made = backwards(job, stage, _layers_of_backward(job, stage, shapes, layers, beside))
    made |= forwards(job, stage, tuple(zip(job.layers_of(stage), layers)), beside, head_of_forward(job, stage, shapes))
    states, first = states_of_phases(job, stage), Turn("F", BEFORE, GATHERED)
    gathered = _first_forward(job, stage, layers, kept) + states[GATHERED] - states[BEFORE]
    made[first] = [*made[first][:-1], max(made[first][-1], Piece(round(gathered)))]
    worst = {turn: max(pieces) for turn, pieces in made.items()}
    replayed = StageBytes(kept, waiting, states=states, in_turn={turn: each.most for turn, each in worst.items()},
                          gathers={turn: each.weights for turn, each in worst.items()},
                          pieces={turn: pieces for turn, pieces in made.items() if len(pieces) > 1},
                          **received_bytes(job, stage, shapes))
    return StageMemory(replayed, sum(each.host for each in layers))


def head_of_forward(job: Job, stage: int, shapes: LayerShapes) -> float:
    """Return the bytes that exist only while a stage's forward makes the loss."""
    if not job.stages[stage].loss or job.engine.logit_bytes is not None:
        return 0.0
    return head_forward(shapes, chunk_of(shapes, job.settings.loss.loss_chunk_size))


def _first_forward(job: Job, stage: int, layers: Sequence[LayerBytes], kept: float) -> float:
    """Return the bytes beside what the first forward keeps, and all gathered weights, when it has just gathered a unit:
    what all data ranks sent of it is there until it is unpacked, and of the unit before. Where all weights are trained
    their gradients take more later.
    """
    indices, units = job.layers_of(stage), gathered_units(job, stage)
    if all(trained_weights(job.settings, index).all for index in indices):
        return 0.0
    if gathers_ahead(job):
        there = units.all if job.freed_by_forwards else 0.0  # which do not stand behind it then
        return there + max([units.outer_sent, *map(units.unpacking, indices)]) - kept
    if job.freed_by_forwards:
        entered = units.entering(indices[0], None) if indices else units.outer
        return entered - kept
    missing, left, behind = units.all - units.outer, units.outer_sent, kept
    found = [0.0, left - kept - missing]
    for index, layer in zip(indices, layers):
        own = units.layers[index]
        missing -= own.dense
        found.append(left + units.sent[index].dense + units.made[index].dense - behind - missing)
        found.append(units.sent[index].dense + layer.attending - (behind - layer.kept) - missing)
        left, behind, missing = units.left(index), behind - layer.kept, missing - own.experts
        found.append(units.unpacking_experts(index, again=False) + layer.gathering - behind - missing)
        found.append(left + layer.forward - behind - missing)
    return max(found)


def _layers_of_backward(job: Job, stage: int, shapes: LayerShapes, layers: Sequence[LayerBytes], beside: float
                        ) -> Layers:
    part, chunk = job.stages[stage], chunk_of(shapes, job.settings.loss.loss_chunk_size)
    own = part.loss and job.engine.logit_bytes is None
    of_head = trained(job, Stage(False, (), (), True)).dense if part.loss else 0
    head = of_head * sizes(job).gradient if chunk or not job.splits_backwards else 0.0
    predictions = 1 + job.model.num_nextn_predict_layers if head else 1  # whose gradients of the weight are made now
    normed = job.model.num_hidden_layers - 1 in part.layers and not part.mtp  # whose norm makes a gradient of it
    given = 0 if normed else received_bytes(job, stage, shapes)["returning"]
    tied = head and job.model.tie_word_embeddings  # one weight, whose gradients are added
    embedding = sizes(job).gradient * trained(job, Stage(True, (), (), False)).dense if part.mtp and not tied else 0.0
    held = input_bytes(job, stage, shapes) + output_bytes(job, stage, shapes)  # by torch, until the backward has ended
    return Layers(tuple(zip(job.layers_of(stage), layers)), beside - held, head_waiting(job, stage, shapes),
                  head, head_backward(shapes, chunk, of_head > 0, predictions) if own else 0.0, given, embedding)


def beside_layers(job: Job, stage: int, shapes: LayerShapes) -> Iterator[tuple[str, float]]:
    """Yield (name, bytes) of what a stage keeps outside of its layers."""
    part, model, numbers = job.stages[stage], job.model, shapes.numbers
    hidden = numbers.plain(shapes.stream, model.hidden_size)
    if part.embedding:
        yield "rows of the vocabulary", total(embedding(shapes))
    if model.num_hidden_layers - 1 in part.layers:
        yield "input of the last norm", hidden + total(norm("", shapes.stream, numbers))
        for_head = not part.loss or not shapes.gathers and _head_reads(job, shapes)
        passed_on = not part.mtp and output_bytes(job, stage, shapes) > 0  # as the output of the stage, which it is
        if (for_head or model.num_nextn_predict_layers) and not passed_on:
            yield "last state", hidden
    if part.loss:
        chunk, predictions = chunk_of(shapes, job.settings.loss.loss_chunk_size), 1 + model.num_nextn_predict_layers
        each = total(head(shapes, chunk, predictions)) if job.engine.logit_bytes is None else \
            shapes.whole * (model.vocab_size // job.layout.tp) * job.engine.logit_bytes
        yield "head", predictions * each
    for name, size in (("input of the stage", input_bytes(job, stage, shapes)),
                       ("output of the stage", output_bytes(job, stage, shapes))):
        if size:
            yield name, size


def input_bytes(job: Job, stage: int, shapes: LayerShapes) -> float:
    """Return the bytes of what a stage received, if its first layer sends its own input to the host: torch's stage
    keeps it beside the copy there.
    """
    offloads = bool(stage and job.stages[stage].layers) and job.modes_of(stage)[0].offloaded
    return received_bytes(job, stage, shapes)["arriving"] if offloads else 0.0


def _trained_of(job: Job, stage: int, index: int, shapes: LayerShapes) -> Trained:
    """Return what is trained of a layer, and whether what the last MTP module gives to a head on its stage is kept."""
    found = trained_weights(job.settings, index)
    last = job.model.num_hidden_layers + job.model.num_nextn_predict_layers - 1
    unread = index == last and job.stages[stage].loss and not _head_reads(job, shapes)
    return replace(found, read=False) if unread else found


def _head_reads(job: Job, shapes: LayerShapes) -> bool:
    """Return whether the head keeps its input: for its weight's gradient, and by chunks in any case."""
    chunk = chunk_of(shapes, job.settings.loss.loss_chunk_size)
    return chunk is not None or trained(job, Stage(False, (), (), True)).dense > 0


def output_bytes(job: Job, stage: int, shapes: LayerShapes) -> float:
    """Return the bytes of what a stage passed on, if it keeps that until its backward."""
    if job.layout.pp == 1 or stage == len(job.stages) - 1 or not job.engine.keeps_output:
        return 0.0
    return states_after(job, stage) * shapes.numbers.plain(shapes.stream, job.model.hidden_size)


def head_waiting(job: Job, stage: int, shapes: LayerShapes) -> float:
    """Return what the head's weight gradient waits with: its inputs, and without chunks the gradients of all logits."""
    if not (job.stages[stage].loss and job.splits_backwards and trained(job, Stage(False, (), (), True)).dense):
        return 0.0
    width = job.model.hidden_size
    if chunk_of(shapes, job.settings.loss.loss_chunk_size) is None:
        width += job.model.vocab_size // job.layout.tp
    return (1 + job.model.num_nextn_predict_layers) * shapes.numbers.plain(shapes.whole, width)


def received_bytes(job: Job, stage: int, shapes: LayerShapes) -> dict[str, int]:
    """Return the bytes of what `stage` receives for a forward (`arriving`) and for a backward (`returning`)."""
    state = shapes.numbers.plain(shapes.stream, job.model.hidden_size)
    return {"arriving": round(state * states_after(job, stage - 1)) if stage else 0,
            "returning": round(state * states_after(job, stage)) if stage < len(job.stages) - 1 else 0}


def arrived(job: Job, pp_rank: int) -> Sequence | None:
    """Return what has arrived for the stages of a pipeline rank in each of its acts and waits, or is being used."""
    return arrived_in_acts(job.schedule, job.layout.pp, job.virtual_stages, job.micro_batches, pp_rank,
                           job.engine.receives_early)


def arrived_in_acts(schedule: str, pp: int, virtual: int, micro_batches: int, rank: int, early: bool
                    ) -> Sequence | None:
    """Return the same of a rank of any pipeline. Engines that do not start receives `early` have one buffer of each
    kind for a stage.
    """
    if pp == 1:
        return None
    if early:
        return waiting_in_acts(schedule, pp, virtual, micro_batches)[rank]
    return (((1, 1),) * len(held_stages(schedule, pp, virtual, rank)),) * len(
        actions(schedule, pp, virtual, micro_batches, rank))


def terms_of_stage(job: Job, stage: int, shapes: LayerShapes) -> Iterator[tuple[str, float]]:
    """Yield (name, bytes) of what a micro-batch keeps on `stage`: layers of a kind together, and the rest."""
    found: dict[str, float] = defaultdict(float)
    for index, mode in zip(job.layers_of(stage), job.modes_of(stage)):
        trains = _trained_of(job, stage, index, shapes)
        found[kind_of(job, index)] += layer_bytes(shapes, index, mode, trained=trains).kept
    for name, size in beside_layers(job, stage, shapes):
        found[name] += size
    yield from found.items()


def kind_of(job: Job, index: int) -> str:
    """Return what the activations of a layer are called in a sum over equal ones."""
    if index >= job.model.num_hidden_layers:
        return "activations of MTP"
    return f"activations of {'MoE' if job.model.is_moe_layer(index) else 'dense'} layers"
