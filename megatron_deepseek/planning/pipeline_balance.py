"""Divide a model over pipeline stages where no layout string does, so that the slowest stage is as fast as possible.

A pipeline runs at the pace of its slowest stage. How long a layer, an MTP module or the output head takes is estimated
by its multiplications for one token in the forward pass; the backward takes twice as many of each, which changes no
comparison. They are the weights that the token uses (of the routed experts, its top k), and in attention the products
with the keys and values of half the sequence, which is how many a token sees on average under the causal mask. The head
is on the last stage and runs once for each prediction, also MTP's. The embedding only looks rows up: it costs nothing.
"""

from itertools import accumulate

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import outer_rows
from megatron_deepseek.parallel.layout_string import Stage, parse
from megatron_deepseek.settings import PipelineSettings


def layer_cost(model: ModelConfig, index: int, seq_length: int) -> int:
    """Return the multiplications per token of layer `index`, or of an MTP module, without the output head."""
    scores = model.num_attention_heads * (model.qk_head_dim + model.value_head_dim) * seq_length // 2
    return model.layer_parameters(index, active=True) + scores


def head_cost(model: ModelConfig) -> int:
    """Return the multiplications per token of the output head, for the next token and for each MTP depth."""
    return sum(row.gemms * row.active for row in outer_rows(model))


def mtp_cost(model: ModelConfig, seq_length: int) -> int:
    """Return the multiplications per token of one MTP module without the output head."""
    return layer_cost(model, model.num_hidden_layers, seq_length)


def stage_cost(model: ModelConfig, stage: Stage, seq_length: int) -> int:
    """Return the multiplications per token of all that a stage holds, 0 for an empty one."""
    layers = sum(layer_cost(model, index, seq_length) for index in stage.layers)
    return layers + len(stage.mtp) * mtp_cost(model, seq_length) + stage.loss * head_cost(model)


def stages(model: ModelConfig, num_stages: int, seq_length: int = 4096) -> tuple[Stage, ...]:
    """Return the contiguous division into `num_stages` non-empty stages whose costliest is the cheapest.

    Among those, the one with the least sum of squares: the stages below the maximum are as even as they can be.
    """
    layers, depths = model.num_hidden_layers, model.num_nextn_predict_layers
    costs = [layer_cost(model, index, seq_length) for index in range(layers)]
    costs += [mtp_cost(model, seq_length)] * depths + [head_cost(model)]
    if num_stages > len(costs):
        raise ValueError(f"{num_stages} pipeline stages are more than the {len(costs)} parts of the model: "
                         f"{layers} layers, {depths} MTP modules, one head")
    return tuple(stage_of(model, first, end) for first, end in divide(costs, num_stages))


def stage_of(model: ModelConfig, first: int, end: int) -> Stage:
    """Return the stage of the parts [first, end) of a model: its layers, MTP modules and head, in this order. The
    embedding goes with the first part.
    """
    layers, depths = model.num_hidden_layers, model.num_nextn_predict_layers
    return Stage(embedding=first == 0,
                 layers=tuple(range(first, min(end, layers))),
                 mtp=tuple(range(max(first, layers) - layers, min(end, layers + depths) - layers)),
                 loss=end == layers + depths + 1)


def resolve(model: ModelConfig, pipeline: PipelineSettings, pp: int, seq_length: int) -> tuple[Stage, ...]:
    """Return a run's stages: those of its layout string, or balanced ones, `num_virtual_stages` on each pp rank."""
    if pipeline.layout is not None:
        return parse(pipeline.layout, model.num_hidden_layers, model.num_nextn_predict_layers)
    return stages(model, pp * pipeline.num_virtual_stages, seq_length)


def divide(costs: list[int], parts: int) -> list[tuple[int, int]]:
    """Return bounds [first, end) of `parts` non-empty runs of `costs`: least maximum, then least sum of squares."""
    prefix = [0, *accumulate(costs)]
    maximum = _best(prefix, parts, max)[0]
    return _best(prefix, parts, lambda total, cost: total + cost * cost if cost <= maximum else float("inf"))[1]


def _best(prefix: list[int], parts: int, add) -> tuple[float, list[tuple[int, int]]]:
    """Return the least `add`-accumulated value over all contiguous divisions, and the division.

    Takes O(parts * len(costs)^2).
    """
    count = len(prefix) - 1
    table = {0: (0, [])}
    for part in range(parts):
        longer = {}
        for end in range(part + 1, count - (parts - part - 1) + 1):
            first = min((f for f in table if f < end), key=lambda f: add(table[f][0], prefix[end] - prefix[f]))
            value, bounds = table[first]
            longer[end] = add(value, prefix[end] - prefix[first]), [*bounds, (first, end)]
        table = longer
    return table[count]
