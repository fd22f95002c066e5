"""How many parameters a rank holds before data ranks divide them, from the table of parameters and the layout."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.freezing import is_frozen
from megatron_deepseek.model.architecture.parameters import (
    EMBEDDING,
    FINAL_NORM,
    Parameter,
    layer_rows,
    layer_total,
    outer_rows,
)
from megatron_deepseek.model.architecture.placements import EP, ETP, TP
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage


@dataclass(frozen=True)
class Held:
    """Parameters of a pipeline rank's stages that one rank holds, before FSDP divides them: dense ones and experts'."""

    dense: int
    experts: int


def held_parameters(model: ModelConfig, layout: Layout, stages: Sequence[Stage], frozen: Sequence[str] = ()) -> Held:
    """Return what a rank that holds `stages` keeps of them under tensor, expert and expert-tensor parallelism, without
    those that the patterns `frozen` name.
    """
    ranks = {TP: layout.tp, EP: layout.ep, ETP: layout.etp}

    def held(mesh: str) -> int:
        def measure(row: Parameter) -> int:
            counts = row.trained and row.mesh == mesh and not is_frozen(row.name, frozen)
            return row.size // row.placement.parts(ranks) if counts else 0

        def of_layer(index: int) -> int:
            if frozen:  # by whole names, which differ from layer to layer
                return sum(map(measure, layer_rows(model, index)))
            return layer_total(model, index, measure)

        layers = [index for stage in stages
                  for index in (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))]
        return (sum(map(of_layer, layers))
                + sum(measure(row) for stage in stages for row in outer_rows(model) if _holds(stage, row, model)))

    return Held(held("dense"), held("expert"))


def _holds(stage: Stage, row: Parameter, model: ModelConfig) -> bool:
    """Return whether a stage holds a row outside of layers: a tied head and MTP modules need the embedding too."""
    if row.name == EMBEDDING:
        return bool(stage.embedding or stage.mtp or (stage.loss and model.tie_word_embeddings))
    return model.num_hidden_layers - 1 in stage.layers if row.name == FINAL_NORM else stage.loss
