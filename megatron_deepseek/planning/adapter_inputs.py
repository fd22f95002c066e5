"""What adapters beside products of the FP8 recipe keep: numbers in the layers' dtype, where the products keep tiles.

A frozen weight's product keeps no input. Each adapter makes numbers of the tiles that it is given, and keeps them by
itself; that of a product behind SwiGLU keeps gate and up, of which it makes its input again (ops/lora.py).
"""

from collections.abc import Iterable, Iterator

from megatron_deepseek.planning.layer_shapes import Kept, LayerShapes
from megatron_deepseek.planning.numbers import TILE
from megatron_deepseek.planning.trained_weights import DOWN, EXPERTS_DOWN, INPUTS_OF, OUTPUT, Trained

AS_NUMBERS = " as numbers"
_TILES = ("attention's input", "normed query latent", "normed key-value latent", "MLP's input", "experts' rows")
_SWIGLU = {"MLP: gate and up": DOWN, "experts: gate and up": (EXPERTS_DOWN,)}


def seen_by_adapters(shapes: LayerShapes, kept: Iterable[Kept], trained: Trained) -> Iterator[Kept]:
    """Yield what is kept of `kept`, tiles of a layer with adapters, if its products are those of the FP8 recipe."""
    numbers, model = shapes.numbers, shapes.model
    wider = numbers.plain(1, TILE) / numbers.tiles(1, TILE)
    for each in kept:
        if each.name in _TILES:
            readers = sum(trained.adapts(name) for name in INPUTS_OF[each.name])
            yield Kept(each.name, each.bytes * wider * readers)
            continue
        yield each
        if each.name == "attention's output" and trained.adapts(OUTPUT):
            yield Kept(each.name + AS_NUMBERS, numbers.plain(shapes.whole, shapes.heads * model.value_head_dim))
        if trained.adapts(*_SWIGLU.get(each.name, ())):
            yield Kept(each.name + AS_NUMBERS, each.bytes * wider)
