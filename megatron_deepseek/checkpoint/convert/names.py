"""Every tensor of a DeepSeek model under Hugging Face's name, and its place in the stacked parameters here.

Conversion renames nothing and stacks experts: expert e's gate_proj, up_proj and down_proj are
`mlp.experts.gate_up_proj`[e, :I], [e, I:] and `mlp.experts.down_proj`[e]. Names, shapes and offsets are those of the
table of parameters (model/architecture/parameters.py).
"""

from dataclasses import dataclass

from megatron_deepseek.checkpoint.regions import Region
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import EMBEDDING, HEAD, hf_tensors


@dataclass(frozen=True)
class Place:
    """Hugging Face's tensor `name` of `shape` is the part of `whole`, of `whole_shape`, that begins at `offset`.

    In `whole` the part has extra leading dimensions of 1 where `whole` has more dimensions.
    """

    name: str
    shape: tuple[int, ...]
    whole: str
    whole_shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, ...]:
        """Return the part's size in `whole`."""
        return (1,) * (len(self.whole_shape) - len(self.shape)) + self.shape

    def rows(self, start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return offset and size in `whole` of the part's rows start..stop."""
        axis = len(self.whole_shape) - len(self.shape)
        offset, size = list(self.offset), list(self.extent)
        offset[axis] += start
        size[axis] = stop - start
        return tuple(offset), tuple(size)

    def rows_of(self, region: Region) -> tuple[int, int]:
        """Return which of the part's rows a region in `whole` is: the inverse of `rows`."""
        axis = len(self.whole_shape) - len(self.shape)
        start = region.place[axis] - self.offset[axis]
        assert self.rows(start, start + region.shape[axis]) == (region.place, region.shape), (self, region)
        return start, start + region.shape[axis]


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
