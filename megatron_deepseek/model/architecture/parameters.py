"""The table of a model's parameters: one row each, from which all else that is said of parameters derives.

Counts (config.py), Hugging Face's tensors and their places (checkpoint/convert/names.py), the memory that a rank holds
and the FLOPs of a token (planning/), what --freeze-parameters may name (freezing.py) and which parameters decay
(training/optimizer.py) are read off the rows. The model itself (model/deepseek.py) is built layer by layer as the
papers have it; tests/unit/model/architecture/test_parameters.py holds each of its parameters against its row. The
table imports no torch.

Shapes: V vocabulary, H hidden, N heads, E experts, I width of an MLP or expert.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import prod

from megatron_deepseek.model.architecture.fields import ArchitectureFields
from megatron_deepseek.model.architecture.placements import (
    COLUMNS,
    EXPERT_COLUMNS,
    EXPERT_ROWS,
    REPLICATED,
    ROWS,
    VOCABULARY_ROWS,
    Placement,
    key_value_rows,
)

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SCORE = "score.weight"  # of a reward model, in place of the head: transformers' name for it
BIAS = "e_score_correction_bias"  # of a noaux_tc router: moved by counts after each step, not by its gradient
MATRIX, VECTOR, UNTRAINED = "matrix", "vector", "untrained"  # groups of the optimizer
MASTER, FLOAT32 = "master", "float32"  # rules of dtypes: that of master weights, or one for good
_CONFIGS = 64  # architectures whose layers are kept


@dataclass(frozen=True)
class HfTensor:
    """A tensor under Hugging Face's name; `offset` is where it begins in the parameter that it is a part of."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One row: a parameter of our model, or the router's bias, which is a buffer.

    `name` is Hugging Face's, with a layer's experts stacked in dimension 0; in the rows of `layer_rows` it is whole.
    `layer`: the layer or MTP module that it belongs to, None for embedding, last norm and head. `gemms`: how often a
    GEMM multiplies a token by it in one forward. `active`: how many of its weights take part in a token's arithmetic:
    of stacked experts the top k, of an embedding that is looked up none. `stacked`: the projections of each expert
    whose rows follow each other in dimension 1, () for what is no stack.
    """

    name: str
    shape: tuple[int, ...]
    placement: Placement = REPLICATED
    layer: int | None = None
    dtype: str = MASTER
    trained: bool = True
    gemms: int = 0
    active: int = 0
    stacked: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    @property
    def mesh(self) -> str:
        """Return which mesh of ranks holds it (parallel/mesh.py): "dense" or "expert"."""
        return self.placement.mesh

    @property
    def group(self) -> str:
        """Return its group in the optimizer."""
        return optimizer_group(self.shape) if self.trained else UNTRAINED

    def hf_tensors(self, expert: int = 0) -> Iterator[HfTensor]:
        """Yield the tensors that `expert`'s part of it is made of, or the one that it is."""
        if not self.stacked:
            yield HfTensor(self.name, self.shape, (0,) * len(self.shape))
            return
        rows, prefix = self.shape[1] // len(self.stacked), self.name.rpartition(".")[0]
        for number, projection in enumerate(self.stacked):
            yield HfTensor(f"{prefix}.{expert}.{projection}.weight", (rows, self.shape[2]), (expert, number * rows, 0))


def optimizer_group(shape: Sequence[int]) -> str:
    """Return MATRIX, which decays, or VECTOR (norm weights, biases), which does not, as in Megatron-LM."""
    return MATRIX if len(shape) > 1 else VECTOR


def parameters(config: ArchitectureFields) -> Iterator[Parameter]:
    """Yield all rows of a model: embedding, layers, MTP modules, last norm, head."""
    embedding, *rest = outer_rows(config)
    yield embedding
    for index in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        yield from layer_rows(config, index)
    yield from rest


def hf_tensors(config: ArchitectureFields) -> Iterator[tuple[Parameter, HfTensor]]:
    """Yield each tensor of the released weights, in the order of their files, with the row that holds it.

    MTP's copies of embedding and head are left out. Experts come one by one.
    """
    for stack, rows in groupby(parameters(config), lambda row: row.name.rpartition(".")[0] if row.stacked else None):
        if stack is None:
            yield from ((row, tensor) for row in rows for tensor in row.hf_tensors())
            continue
        together = list(rows)
        yield from ((row, tensor) for expert in range(together[0].shape[0]) for row in together
                    for tensor in row.hf_tensors(expert))


def outer_rows(config: ArchitectureFields) -> tuple[Parameter, ...]:
    """Return the rows outside of layers. The head multiplies once for each prediction, MTP's included."""
    shape, predictions = (config.vocab_size, config.hidden_size), 1 + config.num_nextn_predict_layers
    norm = _vector(FINAL_NORM, config.hidden_size)
    if config.reward_head:
        return Parameter(EMBEDDING, shape, VOCABULARY_ROWS), norm, _matrix(SCORE, (1, config.hidden_size))
    if config.tie_word_embeddings:
        return _matrix(EMBEDDING, shape, VOCABULARY_ROWS, predictions), norm
    return (Parameter(EMBEDDING, shape, VOCABULARY_ROWS), norm, _matrix(HEAD, shape, VOCABULARY_ROWS, predictions))


def layer_rows(config: ArchitectureFields, index: int) -> tuple[Parameter, ...]:
    """Return the rows of layer `index`; MTP modules have the ids behind the last layer's."""
    prefix = f"model.layers.{index}."
    return tuple(Parameter(prefix + row.name, row.shape, row.placement, index, row.dtype, row.trained, row.gemms,
                           row.active, row.stacked) for row in _rows(config, *_kind(config, index)))


def total(config: ArchitectureFields, measure: Callable[[Parameter], int], mtp: bool = True) -> int:
    """Sum `measure` over all rows, those of MTP modules only with `mtp`; equal layers are measured once."""
    depths = config.num_nextn_predict_layers if mtp else 0
    kinds = Counter(_kind(config, index) for index in range(config.num_hidden_layers + depths))
    layers = sum(number * sum(map(measure, _rows(config, *kind))) for kind, number in kinds.items())
    return sum(map(measure, outer_rows(config))) + layers


def layer_total(config: ArchitectureFields, index: int, measure: Callable[[Parameter], int]) -> int:
    """Sum `measure` over the rows of layer `index`."""
    return sum(map(measure, _rows(config, *_kind(config, index))))


def _kind(config: ArchitectureFields, index: int) -> tuple[bool, bool]:
    """Return what the rows of a layer depend on: whether it routes to experts, and whether it is an MTP module."""
    return config.is_moe_layer(index), index >= config.num_hidden_layers


@lru_cache(4 * _CONFIGS)
def _rows(config: ArchitectureFields, moe: bool, mtp: bool) -> tuple[Parameter, ...]:
    """Return the rows of a kind of layer, named from the layer on."""
    mlp = _experts(config) if moe else _swiglu("mlp", config.hidden_size, config.intermediate_size)
    attention = _grouped_query_attention if config.grouped_query else _latent_attention
    return (*attention(config), *mlp, *_norms(config, mtp))


def _matrix(name: str, shape: tuple[int, ...], placement: Placement = REPLICATED, gemms: int = 1) -> Parameter:
    return Parameter(name, shape, placement, gemms=gemms, active=prod(shape))


def _vector(name: str, size: int, placement: Placement = REPLICATED) -> Parameter:
    return Parameter(name, (size,), placement, active=size)


def _grouped_query_attention(config: ArchitectureFields) -> Iterator[Parameter]:
    """Yield the rows of grouped-query or multi-head attention (arXiv 2305.13245), divided by heads.

    What k and v have is on every rank where there are fewer of their heads than ranks. Norms are of one head each.
    """
    hidden, size, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    of_kv, kv_rows = key_value_rows(config.num_key_value_heads), config.num_key_value_heads * size
    for name, rows, placement in (("q", heads * size, ROWS), ("k", kv_rows, of_kv), ("v", kv_rows, of_kv)):
        yield _matrix(f"self_attn.{name}_proj.weight", (rows, hidden), placement)
        if config.attention_bias or config.qkv_bias:
            yield _vector(f"self_attn.{name}_proj.bias", rows, placement)
    yield _matrix("self_attn.o_proj.weight", (hidden, heads * size), COLUMNS)
    if config.attention_bias:
        yield _vector("self_attn.o_proj.bias", hidden)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        yield _vector(f"self_attn.{name}.weight", size)


def _latent_attention(config: ArchitectureFields) -> Iterator[Parameter]:
    """Yield MLA's rows (V2 report, section 2.1), the up-projections as they are trained: not absorbed.

    Down-projections are replicated, up-projections divided by heads. Biases belong to what reads or writes the
    residual stream, as in transformers.
    """
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    down = [("kv_a_proj_with_mqa", config.kv_lora_rank + config.qk_rope_head_dim, hidden, REPLICATED),
            ("o_proj", hidden, heads * config.v_head_dim, COLUMNS)]
    up = [("kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank, ROWS)]
    if rank is None:
        up.append(("q_proj", heads * config.qk_head_dim, hidden, ROWS))
    else:
        down.append(("q_a_proj", rank, hidden, REPLICATED))
        up.append(("q_b_proj", heads * config.qk_head_dim, rank, ROWS))
        yield _vector("self_attn.q_a_layernorm.weight", rank)
    yield _vector("self_attn.kv_a_layernorm.weight", config.kv_lora_rank)
    for name, rows, columns, placement in down + up:
        yield _matrix(f"self_attn.{name}.weight", (rows, columns), placement)
    if config.attention_bias:
        for name, rows, _, _ in down:
            yield _vector(f"self_attn.{name}.bias", rows)


def _experts(config: ArchitectureFields) -> Iterator[Parameter]:
    """Yield the rows of DeepSeekMoE (arXiv 2401.06066): router, routed experts, shared experts."""
    experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    yield _matrix("mlp.gate.weight", (experts, hidden))
    if config.topk_method == "noaux_tc":
        yield Parameter(f"mlp.gate.{BIAS}", (experts,), dtype=FLOAT32, trained=False)
    for name, rows, columns, placement, stacked in (
            ("gate_up_proj", 2 * width, hidden, EXPERT_ROWS, ("gate_proj", "up_proj")),
            ("down_proj", hidden, width, EXPERT_COLUMNS, ("down_proj",))):
        yield Parameter(f"mlp.experts.{name}", (experts, rows, columns), placement, gemms=1,
                        active=config.num_experts_per_tok * rows * columns, stacked=stacked)
    if config.n_shared_experts:
        yield from _swiglu("mlp.shared_experts", hidden, width * config.n_shared_experts)


def _swiglu(prefix: str, hidden: int, width: int) -> Iterator[Parameter]:
    for projection in ("gate_proj", "up_proj"):
        yield _matrix(f"{prefix}.{projection}.weight", (width, hidden), ROWS)
    yield _matrix(f"{prefix}.down_proj.weight", (hidden, width), COLUMNS)


def _norms(config: ArchitectureFields, mtp: bool) -> Iterator[Parameter]:
    """Yield the layer's norms, and an MTP module's own rows (V3 report, section 2.2)."""
    hidden = config.hidden_size
    if mtp:
        yield _matrix("eh_proj.weight", (hidden, 2 * hidden))
    own = ("enorm", "hnorm", "shared_head.norm") if mtp else ()
    for name in ("input_layernorm", "post_attention_layernorm", *own):
        yield _vector(f"{name}.weight", hidden)
