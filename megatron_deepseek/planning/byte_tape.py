"""What a layer's backward makes and frees, as bytes on a tape: how much there is at any time.

A product in bfloat16 keeps its input and makes two gradients. One of the FP8 recipe (ops/fp8/recipe.py) reads tiles
alone: its output's gradient once by rows for the input's gradient and once by columns for the weight's, and its kept
input by columns too. All of them are there together when its weight's gradient is made.

Where weight gradients are made apart a product in bfloat16 frees neither its input nor the gradient of its output:
both wait. One in FP8 leaves its kept input and the gradient's tiles by columns, and frees the rest.

Behind the product of a weight with an adapter (ops/lora.py) A gives the input another gradient, and the two are added.
If the adapter drops features, its input is made again, and features of A's gradient are dropped too; each time numbers
of 64 bits, one for four features, are drawn of hashes, in three tensors (ops/hashing.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_deepseek.planning.layer_shapes import Kept
from megatron_deepseek.planning.numbers import INDEX, TILE, Numbers
from megatron_deepseek.planning.trained_weights import ALL, INPUTS_OF, OUTPUT, Trained

_HASHES, _FEATURES = 3, 4  # tensors of 64 bits at once while a mask is made; features of a number


@dataclass(frozen=True)
class Backward:
    """A moment of a layer's backward. `bytes`: what exists then, less those of the layer's kept ones that are free
    again, without weight gradients, of which those of `dense` and `experts` parameters exist. `given`: the gradient of
    the layer's output is still there, and counted. `ends`: a unit of FSDP whose gradients are summed or reduced then,
    "experts", "router" or "layer"; `ended`: the one of these that has ended last. `piece`: how many exchanges have
    begun before; `waits`: the next one begins now. `reruns`: the layer's forward is made again; `attends`: it is in its
    attention.
    """

    bytes: float
    dense: float = 0.0
    experts: float = 0.0
    given: bool = True
    ends: str = ""
    ended: str = ""
    piece: int = 0
    waits: bool = False
    reruns: bool = False
    attends: bool = False


class Tape:
    """Bytes as they come and go. `there`: the kept tensors of the layer that are on the device before its backward;
    others are made again, or brought back, when they are used. `deferred`: weight gradients are made apart. `trained`:
    which weights of the layer have gradients, or adapters. `groups`: a rank's routed experts.
    """

    def __init__(self, whole: Iterable[Kept], there: Iterable[Kept], deferred: bool, numbers: Numbers,
                 trained: Trained = ALL, groups: int = 1):
        self._sizes: dict[str, float] = {}
        for each in whole:
            self._sizes[each.name] = self._sizes.get(each.name, 0.0) + each.bytes
        self._there = {each.name for each in there}
        self._deferred, self._numbers, self._trained, self._groups = deferred, numbers, trained, groups
        self._now, self._dense, self._experts, self._given, self._ended = 0.0, 0.0, 0.0, True, ""
        self._piece, self._reruns, self._attends = 0, False, False
        self.moments: list[Backward] = []

    def make(self, size: float) -> None:
        """Allocate so many bytes."""
        self._now += size
        self._note()

    def rerun(self, size: float, exchanges: int) -> None:
        """Allocate so many bytes while the layer's forward is made again, and until so many exchanges have begun."""
        self._reruns = True
        self.make(size)
        self.exchange(exchanges)
        self.drop(size)
        self._reruns = False

    def attend_again(self, size: float) -> None:
        """Allocate so many bytes while attention of the layer's forward is made again."""
        self._attends = True
        self.rerun(size, 0)
        self._attends = False

    def drop(self, *sizes: float) -> None:
        """Free what was made."""
        self._now -= sum(sizes)

    def use(self, *names: str) -> None:
        """Read kept tensors, which are made again or brought back if they are not there."""
        for name in names:
            if name in self._sizes and name not in self._there:
                self._there.add(name)
                self.make(self._sizes[name])

    def size_of(self, name: str) -> float:
        """Return the bytes of a kept tensor, 0 if the layer has none of this name."""
        return self._sizes.get(name, 0.0)

    def free(self, *names: str) -> None:
        """Free kept tensors."""
        for name in names:
            if name in self._there:
                self._there.remove(name)
                self._now -= self._sizes[name]

    def has(self, name: str) -> bool:
        """Return whether a kept tensor is there."""
        return name in self._there

    def free_unless_deferred(self, *names: str) -> None:
        """Free inputs of products, which wait where weight gradients are made apart."""
        self.free(*(each for each in names if not self._waits(each)))

    def is_frozen(self, source: str | None) -> bool:
        """Return whether the weight of a product with this input has no gradient, nor an adapter."""
        readers = () if source is None else _readers(source)
        return bool(readers) and not self._trained.gradients_of(*readers)

    def _waits(self, source: str | None) -> bool:
        """Return whether the weight gradient of a product with this input is made apart."""
        return self._deferred and not self.is_frozen(source)

    def tiles(self, size: float) -> float:
        """Return the bytes of E4M3 tiles of what takes `size` bytes in the layers' dtype; 0 if products are not in FP8.
        """
        return self._numbers.tiles(1, TILE) / self._numbers.plain(1, TILE) * size if self._numbers.fp8 else 0.0

    def product(self, source: str | None, gradient: float, result: float, parameters: float, experts: bool = False,
                stays: bool = False, received: bool = False, in_recipe: bool = True) -> None:
        """Go back through a product: from `gradient` bytes of its output's gradient to `result` bytes of its input's,
        and its weight's gradient. `source` is its kept input, which others read too if it `stays`. A `received`
        gradient is the layer's own, and is not freed. `in_recipe`: where there is an FP8 recipe it is in FP8.
        """
        if source is not None:
            self.use(source)
        each = self.tiles(gradient) if in_recipe else 0.0
        plain = self._made_plain(parameters, experts) if in_recipe else 0.0
        if self.is_frozen(source):
            self.make(each)
            self.make(result)
            self.drop(each)
        else:
            self.make(2 * each)
            self.make(result)
            self._weigh_input(self.tiles(result) if in_recipe else 0.0, each, each, parameters, experts)
        self.drop(plain)
        if not received and (each or not self._waits(source)):
            self.drop(gradient)
        self._adapter(source, result, stays)
        if source is not None and not stays:
            self.free_unless_deferred(source)

    def _made_plain(self, parameters: float, experts: bool) -> float:
        """Make a weight plain for a product, and return its bytes; 0 if it is so in any case."""
        made, beside = self._numbers.made_plain(parameters), self._numbers.while_made(
            parameters, self._groups if experts else 1)
        self.make(made + beside)
        self.drop(beside)
        return made

    def products_of_swiglu(self, source: str, count: int, gradient: float, result: float, parameters: float,
                           experts: bool = False) -> None:
        """Go back through the `count` products, of `parameters` each, whose outputs SwiGLU has read: their gradients
        are there, each `gradient` bytes in the layers' dtype, but in FP8 as tiles, which are one tensor for all.
        """
        each = self.tiles(gradient)
        if not each:
            for number in range(count):
                self.product(source, gradient, result, parameters, experts, stays=number < count - 1)
        else:
            self.use(source)
            for _ in range(count):
                self.make(result)
                if not self.is_frozen(source):
                    self._weigh_input(self.tiles(result), 0.0, 0.0, parameters, experts)
                self._adapter(source, result, stays=True)
            self.drop(count * each, 0.0 if self._waits(source) else count * each)
        self.free_unless_deferred(source)

    def _adapter(self, source: str | None, size: float, stays: bool) -> None:
        """Go back through the adapter that reads `source`, if there is one, to the gradient of its input, of `size`
        bytes, which is added to that of the weight's product. Where features are dropped the input without them is
        what A's gradient needs, and waits for it.
        """
        if source is None or not self._trained.adapts(*_readers(source)):
            return
        if self._trained.drops:
            hashes = _HASHES * size / self._numbers.element * INDEX / _FEATURES
            self.make(size + hashes)  # the input without the dropped features
            self.drop(hashes)
            if not stays:
                self.free(source)
            self.make(size)
            if not self._deferred:
                self.drop(size)
            self.make(size + hashes)
            self.drop(size + hashes)
        else:
            self.make(size)
        self.make(size)
        self.drop(2 * size)

    def weigh(self, rows: float, columns: float, parameters: float, experts: bool) -> None:
        """Make a weight's gradient of tiles of `columns` bytes and free these, unless they wait for it; free `rows`
        bytes of the output gradient's other tiles.
        """
        if not self._deferred:
            if experts:
                self._experts += parameters
            else:
                self._dense += parameters
            self._note()
            self.drop(columns)
        self.drop(rows)

    def _weigh_input(self, of_input: float, rows: float, columns: float, parameters: float, experts: bool) -> None:
        """Make a weight's gradient with tiles of the kept input, which are then made of it."""
        if not self._deferred:
            self.make(of_input)
            columns += of_input
        self.weigh(rows, columns, parameters, experts)

    def give_back(self, size: float) -> None:
        """Free the gradient of the layer's output."""
        self._given = False
        self._now -= size

    def end(self, unit: str) -> None:
        """Mark the end of a unit of FSDP, whose weight gradients are then no longer in the layers' dtype."""
        if self._deferred:
            return
        dense, experts = (0.0 if unit == "layer" else self._dense), (0.0 if unit == "experts" else self._experts)
        self.moments.append(Backward(self._now, dense, experts, self._given, unit, self._ended, self._piece))
        self._dense, self._experts, self._ended = dense, experts, unit

    def exchange(self, number: int) -> None:
        """Begin so many exchanges, one after the other, and wait for each while another run computes."""
        for _ in range(number):
            self._note(waits=True)
            self._piece += 1

    def _note(self, waits: bool = False) -> None:
        self.moments.append(Backward(self._now, self._dense, self._experts, self._given, "", self._ended, self._piece,
                                     waits, self._reruns, self._attends))


def _readers(source: str) -> tuple[str, ...]:
    """Return the weights whose products read a kept tensor."""
    return (OUTPUT,) if source == "attention's output" else INPUTS_OF.get(source, ())
