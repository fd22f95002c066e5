"""How many parameters a rank holds before data ranks divide them, from the table of parameters and the layout."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_deepseek.model.architecture.adapters import LoraSettings, factor_rows, is_adapted
from megatron_deepseek.model.architecture.base_weights import ROUTER, BaseSettings, frozen_shape, is_quantised
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.freezing import is_frozen
from megatron_deepseek.model.architecture.parameters import (
    EMBEDDING,
    FINAL_NORM,
    Parameter,
    layer_rows,
    outer_rows,
)
from megatron_deepseek.model.architecture.placements import EP, ETP, TP
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage


@dataclass(frozen=True)
class Held:
    """Parameters of a pipeline rank's stages, or their bytes, that one rank holds before FSDP divides them: dense ones
    and experts'.
    """

    dense: int
    experts: int


def held_parameters(model: ModelConfig, layout: Layout, stages: Sequence[Stage], frozen: Sequence[str] = ()) -> Held:
    """Return what a rank that holds `stages` keeps of them under tensor, expert and expert-tensor parallelism, without
    those that the patterns `frozen` name.
    """
    ranks, patterns = _Ranks(layout.tp, layout.ep, layout.etp), tuple(frozen)
    parts = [_of_layer(model, index, ranks, patterns) for stage in stages
             for index in (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))]
    parts += [_of_rows([row for row in outer_rows(model) if _holds(stage, row, model)], ranks, patterns)
              for stage in stages]
    return Held(sum(part.dense for part in parts), sum(part.experts for part in parts))


def held_adapters(model: ModelConfig, layout: Layout, stages: Sequence[Stage], lora: LoraSettings) -> Held:
    """Return what a rank that holds `stages` has of the adapters beside them, divided as their weights are."""
    ranks = _Ranks(layout.tp, layout.ep, layout.etp)
    parts = [_of_adapters(model, index, ranks, lora) for stage in stages
             for index in (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))]
    return Held(sum(part.dense for part in parts), sum(part.experts for part in parts))


class Kept(NamedTuple):
    """Bytes of a number of a frozen weight: `router` of a router's, `element` of all others, but for what `base` keeps
    in fewer bits.
    """

    element: int
    router: int
    base: BaseSettings | None


def held_base(model: ModelConfig, layout: Layout, stages: Sequence[Stage], kept: Kept) -> Held:
    """Return the bytes of the frozen weights beside adapters that a rank which holds `stages` has of them."""
    ranks = _Ranks(layout.tp, layout.ep, layout.etp)
    parts = [_base_of_layer(model, index, ranks, kept) for stage in stages
             for index in (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))]
    return Held(sum(part.dense for part in parts) + held_outside(model, layout, stages, kept),
                sum(part.experts for part in parts))


def held_outside(model: ModelConfig, layout: Layout, stages: Sequence[Stage], kept: Kept) -> int:
    """Return the bytes of the weights in no layer, all of them dense: embedding, last norm and head."""
    ranks = _Ranks(layout.tp, layout.ep, layout.etp)
    return sum(_base_of_rows([row for row in outer_rows(model) if _holds(stage, row, model)], ranks, kept).dense
               for stage in stages)


class _Ranks(NamedTuple):
    tp: int
    ep: int
    etp: int


@lru_cache(8192)
def _of_layer(model: ModelConfig, index: int, ranks: _Ranks, frozen: tuple[str, ...]) -> Held:
    return _of_rows(layer_rows(model, index), ranks, frozen)


@lru_cache(8192)
def _of_adapters(model: ModelConfig, index: int, ranks: _Ranks, lora: LoraSettings) -> Held:
    adapted = (row for row in layer_rows(model, index) if is_adapted(model, row, lora))
    return _of_rows([factor for row in adapted for factor in factor_rows(row, lora.lora_rank)], ranks, ())


@lru_cache(8192)
def _base_of_layer(model: ModelConfig, index: int, ranks: _Ranks, kept: Kept) -> Held:
    return _base_of_rows(layer_rows(model, index), ranks, kept)


def _base_of_rows(rows: Iterable[Parameter], ranks: _Ranks, kept: Kept) -> Held:
    axes, held = {TP: ranks.tp, EP: ranks.ep, ETP: ranks.etp}, {"dense": 0, "expert": 0}
    for row in rows:
        if not row.trained:
            continue
        if kept.base is not None and is_quantised(row):
            held[row.mesh] += frozen_shape(row, kept.base, axes).local_bytes
        else:
            number = kept.router if row.name.endswith(ROUTER) else kept.element
            held[row.mesh] += number * row.size // row.placement.parts(axes)
    return Held(held["dense"], held["expert"])


def _of_rows(rows: Iterable[Parameter], ranks: _Ranks, frozen: tuple[str, ...]) -> Held:
    axes, held = {TP: ranks.tp, EP: ranks.ep, ETP: ranks.etp}, {"dense": 0, "expert": 0}
    for row in rows:
        if row.trained and not is_frozen(row.name, frozen):
            held[row.mesh] += row.size // row.placement.parts(axes)
    return Held(held["dense"], held["expert"])


def _holds(stage: Stage, row: Parameter, model: ModelConfig) -> bool:
    """Return whether a stage holds a row outside of layers: a tied head and MTP modules need the embedding too."""
    if row.name == EMBEDDING:
        return bool(stage.embedding or stage.mtp or (stage.loss and model.tie_word_embeddings))
    return model.num_hidden_layers - 1 in stage.layers if row.name == FINAL_NORM else stage.loss
