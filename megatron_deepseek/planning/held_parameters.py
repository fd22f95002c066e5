"""How many parameters a rank holds before data ranks divide them, from the table of parameters and the layout.

FSDP divides dimension 0 of what a rank has of a parameter: each data rank gets as many rows as the first, and what is
missing behind the last ones is padding, in shards as in what is gathered and reduced. Where ranks divide the rows of
all parameters evenly there is none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
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
    and experts'. `*_padding`: what FSDP adds to them for ranks that do not divide them evenly.
    """

    dense: int
    experts: int
    dense_padding: int = 0
    experts_padding: int = 0

    def __add__(self, other: "Held") -> "Held":
        return Held(self.dense + other.dense, self.experts + other.experts, self.dense_padding + other.dense_padding,
                    self.experts_padding + other.experts_padding)

    @property
    def count(self) -> int:
        """Return how many there are of both."""
        return self.dense + self.experts

    @property
    def padded(self) -> "Held":
        """Return as many as data ranks divide evenly."""
        if not self.dense_padding and not self.experts_padding:
            return self
        return Held(self.dense + self.dense_padding, self.experts + self.experts_padding)


def together(parts: Sequence[Held]) -> Held:
    """Return the sum of several."""
    if len(parts) == 1:
        return parts[0]
    return Held(sum(part.dense for part in parts), sum(part.experts for part in parts),
                sum(part.dense_padding for part in parts), sum(part.experts_padding for part in parts))


def held_parameters(model: ModelConfig, layout: Layout, stages: Sequence[Stage], frozen: Sequence[str] = ()) -> Held:
    """Return what a rank that holds `stages` keeps of them under tensor, expert and expert-tensor parallelism, without
    those that the patterns `frozen` name.
    """
    ranks, patterns = _ranks(layout), tuple(frozen)
    return together([_of_stage(model, stage, ranks, patterns) for stage in stages])


def held_adapters(model: ModelConfig, layout: Layout, stages: Sequence[Stage], lora: LoraSettings) -> Held:
    """Return what a rank that holds `stages` has of the adapters beside them, divided as their weights are."""
    ranks = _ranks(layout)
    parts = [_of_adapters(model, index, ranks, lora) for stage in stages
             for index in (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))]
    return together(parts)


class Kept(NamedTuple):
    """Bytes of a number of a frozen weight, or of a gathered adapter: `router` of a router's, `element` of all others,
    but for what `base` keeps in fewer bits.
    """

    element: int
    router: int
    base: BaseSettings | None


def held_base(model: ModelConfig, layout: Layout, stages: Sequence[Stage], kept: Kept) -> Held:
    """Return the bytes of the frozen weights beside adapters that a rank which holds `stages` has of them."""
    ranks = _ranks(layout)
    parts = [_base_of_layer(model, index, ranks, kept) for stage in stages
             for index in (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))]
    return together((*parts, held_outside(model, layout, stages, kept)))


def gathered_adapters(model: ModelConfig, layout: Layout, stages: Sequence[Stage], lora: LoraSettings, kept: Kept
                      ) -> Held:
    """Return the bytes that a rank which holds `stages` computes with of adapters: the router's in its dtype."""
    ranks = _ranks(layout)
    parts = [_bytes_of_adapters(model, index, ranks, lora, kept) for stage in stages
             for index in (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))]
    return together(parts)


def held_outside(model: ModelConfig, layout: Layout, stages: Sequence[Stage], kept: Kept) -> Held:
    """Return the bytes of the weights in no layer, all of them dense: embedding, last norm and head."""
    ranks = _ranks(layout)
    return together([_base_of_rows([row for row in outer_rows(model) if _holds(stage, row, model)], ranks, kept)
                     for stage in stages])


@lru_cache(8192)
def largest_products(model: ModelConfig, layout: Layout, index: int) -> Held:
    """Return how many numbers a rank has of the largest weight of a product in layer `index`: of those that the FP8
    recipe multiplies with, dense ones and routed experts'.
    """
    axes = _ranks(layout).axes()
    sizes = [(row.mesh == "expert", prod(_local(row, axes))) for row in layer_rows(model, index) if is_quantised(row)]
    return Held(*(max((size for experts, size in sizes if experts == wanted), default=0) for wanted in (False, True)))


class _Ranks(NamedTuple):
    """Sizes of the meshes; `data`: among how many data ranks dense parameters are divided, and experts'."""

    tp: int
    ep: int
    etp: int
    data: tuple[int, int]

    def axes(self) -> dict[str, int]:
        """Return the ranks of each axis that divides parameters."""
        return {TP: self.tp, EP: self.ep, ETP: self.etp}

    def missing(self, row: Parameter, shape: Sequence[int]) -> int:
        """Return how many numbers FSDP adds to a rank's part of `row`, of `shape`."""
        return -shape[0] % self.data[row.mesh == "expert"] * prod(shape[1:])


def _ranks(layout: Layout) -> _Ranks:
    return _Ranks(layout.tp, layout.ep, layout.etp, (layout.dp * layout.cp, layout.edp))


@lru_cache(8192)
def _of_stage(model: ModelConfig, stage: Stage, ranks: _Ranks, frozen: tuple[str, ...]) -> Held:
    layers = (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))
    outside = [row for row in outer_rows(model) if _holds(stage, row, model)]
    return together([*(_of_layer(model, index, ranks, frozen) for index in layers), _of_rows(outside, ranks, frozen)])


@lru_cache(8192)
def _of_layer(model: ModelConfig, index: int, ranks: _Ranks, frozen: tuple[str, ...]) -> Held:
    return _of_rows(layer_rows(model, index), ranks, frozen)


@lru_cache(8192)
def _of_adapters(model: ModelConfig, index: int, ranks: _Ranks, lora: LoraSettings) -> Held:
    adapted = (row for row in layer_rows(model, index) if is_adapted(model, row, lora))
    return _of_rows([factor for row in adapted for factor in factor_rows(row, lora.lora_rank)], ranks, ())


@lru_cache(8192)
def _bytes_of_adapters(model: ModelConfig, index: int, ranks: _Ranks, lora: LoraSettings, kept: Kept) -> Held:
    axes, found = ranks.axes(), []
    for row in layer_rows(model, index):
        number = kept.router if row.name.endswith(ROUTER) else kept.element
        for factor in factor_rows(row, lora.lora_rank) if is_adapted(model, row, lora) else ():
            local = _local(factor, axes)
            found.append(_of(factor, number * prod(local), number * ranks.missing(factor, local)))
    return together(found)


@lru_cache(8192)
def _base_of_layer(model: ModelConfig, index: int, ranks: _Ranks, kept: Kept) -> Held:
    return _base_of_rows(layer_rows(model, index), ranks, kept)


def _base_of_rows(rows: Iterable[Parameter], ranks: _Ranks, kept: Kept) -> Held:
    axes, found = ranks.axes(), []
    for row in rows:
        if not row.trained:
            continue
        if kept.base is not None and is_quantised(row):
            shape = frozen_shape(row, kept.base, axes)
            found.append(_of(row, shape.local_bytes, sum(ranks.missing(row, each)
                                                         for each in (shape.local_codes, shape.local_scales))))
        else:
            number, local = kept.router if row.name.endswith(ROUTER) else kept.element, _local(row, axes)
            found.append(_of(row, number * prod(local), number * ranks.missing(row, local)))
    return together(found)


def _of_rows(rows: Iterable[Parameter], ranks: _Ranks, frozen: tuple[str, ...]) -> Held:
    axes, found = ranks.axes(), []
    for row in rows:
        if row.trained and not is_frozen(row.name, frozen):
            local = _local(row, axes)
            found.append(_of(row, prod(local), ranks.missing(row, local)))
    return together(found)


def _of(row: Parameter, size: int, padding: int) -> Held:
    return Held(0, size, 0, padding) if row.mesh == "expert" else Held(size, 0, padding)


def _local(row: Parameter, axes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape that a rank has of a parameter. Plans may be of ranks that divide none evenly: these round down.
    """
    local = list(row.shape)
    for division in row.placement.divisions:
        local[division.dim] //= division.parts(axes[division.axis])
    return tuple(local)


def _holds(stage: Stage, row: Parameter, model: ModelConfig) -> bool:
    """Return whether a stage holds a row outside of layers: a tied head and MTP modules need the embedding too."""
    if row.name == EMBEDDING:
        return bool(stage.embedding or stage.mtp or (stage.loss and model.tie_word_embeddings))
    return model.num_hidden_layers - 1 in stage.layers if row.name == FINAL_NORM else stage.loss
