"""The GEMMs of a layer on one rank, by their shapes: from the table of parameters, the layout and a micro-batch."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_deepseek.model.architecture.parameters import Parameter, layer_rows, outer_rows
from megatron_deepseek.model.architecture.placements import EP, ETP, TP
from megatron_deepseek.planning.layer_shapes import UP_PROJECTION, LayerShapes

# What mla_up_proj of --recompute-modules makes again: queries, keys and values, of whatever they are made of.
_REMADE = ("q_b_proj", "kv_b_proj", "q_proj", "k_proj", "v_proj")
_WIDE = (".mlp.gate.", "eh_proj")  # outside of the FP8 recipe, as the head is


@dataclass(frozen=True)
class Product:
    """[rows, width] times [width, columns], for each of `groups` (experts) with its part of the rows. `fp8`: in the FP8
    recipe; `again`: the module of --recompute-modules that multiplies once more in the backward.
    """

    rows: float
    columns: int
    width: int
    groups: int = 1
    fp8: bool = False
    again: str | None = None

    @property
    def flops(self) -> float:
        """Return two operations for each multiply-add."""
        return 2.0 * self.rows * self.columns * self.width


def layer_products(shapes: LayerShapes, index: int) -> Iterator[Product]:
    """Yield the products of layer `index`; ids from num_hidden_layers on are MTP modules."""
    for row in layer_rows(shapes.model, index):
        if row.gemms:
            yield _product(shapes, row)


def head_product(shapes: LayerShapes) -> Product:
    """Return the output head's product for all predictions together."""
    row = next(row for row in outer_rows(shapes.model) if row.gemms)
    columns, width = row.placement.local_shape(row.shape, _ranks(shapes))
    return Product(row.gemms * shapes.whole, columns, width)


def _ranks(shapes: LayerShapes) -> dict[str, int]:
    return {TP: shapes.layout.tp, EP: shapes.layout.ep, ETP: shapes.layout.etp}


def _product(shapes: LayerShapes, row: Parameter) -> Product:
    fp8 = shapes.numbers.fp8 and not any(name in row.name for name in _WIDE)
    local = row.placement.local_shape(row.shape, _ranks(shapes))
    if row.mesh == "expert":
        groups, columns, width = local
        return Product(shapes.expert_rows, columns, width, groups, fp8)
    columns, width = local
    rows = shapes.whole if row.placement.divisions else shapes.own if _WIDE[0] in row.name else shapes.stream
    again = UP_PROJECTION if row.name.split(".")[-2] in _REMADE else None
    return Product(rows, columns, width, 1, fp8, again)
