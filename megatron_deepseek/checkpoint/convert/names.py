"""Every tensor of a DeepSeek model under Hugging Face's name, and its place in the stacked parameters here.

Conversion renames nothing and stacks experts: expert e's gate_proj, up_proj and down_proj are
`mlp.experts.gate_up_proj`[e, :I], [e, I:] and `mlp.experts.down_proj`[e].
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_deepseek.checkpoint.regions import Region
from megatron_deepseek.model.architecture.config import ModelConfig

BIAS = "e_score_correction_bias"


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
        """The part's size in `whole`."""
        return (1,) * (len(self.whole_shape) - len(self.shape)) + self.shape

    def rows(self, start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and size in `whole` of the part's rows start..stop."""
        axis = len(self.whole_shape) - len(self.shape)
        offset, size = list(self.offset), list(self.extent)
        offset[axis] += start
        size[axis] = stop - start
        return tuple(offset), tuple(size)

    def rows_of(self, region: Region) -> tuple[int, int]:
        """The inverse of `rows`: which of the part's rows a region in `whole` is."""
        axis = len(self.whole_shape) - len(self.shape)
        start = region.place[axis] - self.offset[axis]
        assert self.rows(start, start + region.shape[axis]) == (region.place, region.shape), (self, region)
        return start, start + region.shape[axis]


def native_places(config: ModelConfig) -> list[Place]:
    """All tensors in the order of the layers."""
    return [_place(name, shape, config) for name, shape in hf_shapes(config).items()]


def _place(name: str, shape: tuple[int, ...], config: ModelConfig) -> Place:
    prefix, found, rest = name.partition(".mlp.experts.")
    if not found:
        return Place(name, shape, name, shape, (0,) * len(shape))
    expert, projection, _ = rest.split(".")
    experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    if projection == "down_proj":
        return Place(name, shape, f"{prefix}.mlp.experts.down_proj", (experts, hidden, width), (int(expert), 0, 0))
    row = width if projection == "up_proj" else 0
    return Place(name, shape, f"{prefix}.mlp.experts.gate_up_proj", (experts, 2 * width, hidden),
                 (int(expert), row, 0))


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released weights, MTP's copies of embedding and head left out."""
    shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for index in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{index}."
        for parts in (_attention(config), _mlp(config, index), _norms(config, index)):
            shapes |= {prefix + name: shape for name, shape in parts}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """The MTP modules' copies of embedding and head, as the release has them, and what each is a copy of."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    copies = {}
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}."
        copies[prefix + "embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[prefix + "shared_head.head.weight"] = head
    return copies


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to; None for embedding, last norm and head."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def _attention(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    down = [("kv_a_proj_with_mqa", config.kv_lora_rank + config.qk_rope_head_dim, hidden),
            ("o_proj", hidden, heads * config.v_head_dim)]
    up = [("kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)]
    if rank is None:
        up.append(("q_proj", heads * config.qk_head_dim, hidden))
    else:
        down.append(("q_a_proj", rank, hidden))
        up.append(("q_b_proj", heads * config.qk_head_dim, rank))
        yield "self_attn.q_a_layernorm.weight", (rank,)
    yield "self_attn.kv_a_layernorm.weight", (config.kv_lora_rank,)
    for name, rows, columns in down + up:
        yield f"self_attn.{name}.weight", (rows, columns)
    if config.attention_bias:
        for name, rows, _ in down:
            yield f"self_attn.{name}.bias", (rows,)


def _mlp(config: ModelConfig, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    if not config.is_moe_layer(index):
        yield from _swiglu("mlp", hidden, config.intermediate_size)
        return
    yield "mlp.gate.weight", (config.n_routed_experts, hidden)
    if config.topk_method == "noaux_tc":
        yield f"mlp.gate.{BIAS}", (config.n_routed_experts,)
    for expert in range(config.n_routed_experts):
        yield from _swiglu(f"mlp.experts.{expert}", hidden, width)
    if config.n_shared_experts:
        yield from _swiglu("mlp.shared_experts", hidden, width * config.n_shared_experts)


def _swiglu(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for projection in ("gate_proj", "up_proj"):
        yield f"{prefix}.{projection}.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _norms(config: ModelConfig, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The layer's norms, and an MTP module's own parts."""
    hidden = config.hidden_size
    names = ["input_layernorm", "post_attention_layernorm"]
    if index >= config.num_hidden_layers:
        names += ["enorm", "hnorm", "shared_head.norm"]
        yield "eh_proj.weight", (hidden, 2 * hidden)
    for name in names:
        yield f"{name}.weight", (hidden,)
