"""Every tensor of a model under Hugging Face's name, and its place in the stacked parameters here.

Conversion renames nothing and stacks experts: expert e's gate_proj, up_proj and down_proj are
`mlp.experts.gate_up_proj`[e, :I], [e, I:] and `mlp.experts.down_proj`[e]. Names, shapes and offsets are those of the
table of parameters (model/architecture/parameters.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_deepseek.parallel.regions import Region
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import EMBEDDING, HEAD, hf_tensors


@dataclass(frozen=True)
class Place:
    """Hugging Face's tensor `name` of `shape` is the part of `whole`, of `whole_shape`, that begins at `offset`.

    In `whole` the part has extra leading dimensions of 1 where `whole` has more dimensions. Where `run` is given, only
    so many of its rows follow each other there; the next ones begin `step` rows after these began. `transposed`: its
    two dimensions are exchanged there, so that its rows are columns.
    """

    name: str
    shape: tuple[int, ...]
    whole: str
    whole_shape: tuple[int, ...]
    offset: tuple[int, ...]
    run: int | None = None
    step: int = 0
    transposed: bool = False

    @property
    def extent(self) -> tuple[int, ...]:
        """Return the part's size in `whole`."""
        own = self.shape[::-1] if self.transposed else self.shape
        return (1,) * (len(self.whole_shape) - len(self.shape)) + own

    @property
    def axis(self) -> int:
        """Return the dimension of `whole` along which the part's rows follow each other."""
        return len(self.whole_shape) - (1 if self.transposed else len(self.shape))

    def rows(self, start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return offset and size in `whole` of the part's rows start..stop."""
        axis = self.axis
        offset, size = list(self.offset), list(self.extent)
        offset[axis] += start
        size[axis] = stop - start
        return tuple(offset), tuple(size)

    def regions(self, start: int = 0, stop: int | None = None) -> Iterator[Region]:
        """Yield the regions in `whole` of the part's rows start..stop, in the order of the rows; by default of all."""
        if not self.shape:
            yield Region(self.offset, self.extent)
            return
        stop = self.shape[0] if stop is None else stop
        run = self.run or self.shape[0]
        while start < stop:
            number, before = divmod(start, run)
            last = min(stop, start + run - before)
            offset, size = self.rows(before, before + last - start)
            axis = self.axis
            yield Region((*offset[:axis], offset[axis] + number * self.step, *offset[axis + 1:]), size)
            start = last

    def rows_of(self, region: Region) -> tuple[int, int]:
        """Return which of the part's rows a region in `whole` is: the inverse of `regions`, where there is one."""
        axis = self.axis
        start = region.place[axis] - self.offset[axis]
        if self.run is not None:
            number, start = divmod(start, self.step)
            start += number * self.run
        stop = start + region.shape[axis]
        assert [*self.regions(start, stop)] == [region], (self, region)
        return start, stop


def native_places(config: ModelConfig) -> list[Place]:
    """Return the place of each tensor in our parameters, in the order of the layers."""
    return [Place(tensor.name, tensor.shape, row.name, row.shape, tensor.offset) for row, tensor in hf_tensors(config)]


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the released weights, MTP's copies of embedding and head left out."""
    return {tensor.name: tensor.shape for _, tensor in hf_tensors(config)}


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """Return the MTP modules' copies of embedding and head, as the release has them, and what each is a copy of."""
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    copies = {}
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}."
        copies[prefix + "embed_tokens.weight"] = EMBEDDING
        copies[prefix + "shared_head.head.weight"] = head
    return copies


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to, None for embedding, last norm and head."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None
