"""The adapters of LoRA (arXiv 2106.09685) as rows of the table of parameters: which weights have one, and its shapes.

    W x  becomes  W x + scale * B (A x)        A [r, in], B [out, r]; scale = alpha / r, with rank-stabilised LoRA
                                               (arXiv 2312.03732) alpha / sqrt(r)

Names and shapes are PEFT's: `q_b_proj.lora_A.weight` beside `q_b_proj.weight`. Each routed expert has adapters of its
own for gate, up and down, stacked like the experts: `experts.gate_up_proj_lora_A` [E, 2r, H] has gate's A before up's.
A is divided among ranks as the inputs of its weight are, B as the outputs. Nothing here imports torch.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import Parameter, parameters
from megatron_deepseek.model.architecture.placements import REPLICATED, Division, Placement
from megatron_deepseek.near_names import near_names

A, B = "lora_A", "lora_B"
ATTENTION, MLP, EXPERTS, ROUTER, MTP, ALL = "attention", "mlp", "experts", "router", "mtp", "all"
GROUPS = (ATTENTION, MLP, EXPERTS, ROUTER, MTP, ALL)
_IN_ALL = (ATTENTION, MLP, EXPERTS)
_ADAPTER = re.compile(r"(.+?)[._](lora_[AB])(\.weight)?")
_NEAR = 0.5  # a target names a kind of layer, of which there are few


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of LoRA beside frozen weights; the fields are named after their options.

    `lora_target`: groups and names of layers. `lora_rs`: the scale is alpha / sqrt(rank), not alpha / rank.
    `lora_dropout`: the probability with which training sets a feature of A's input to zero.
    """

    lora_rank: int
    lora_alpha: float
    lora_target: tuple[str, ...] = (ALL,)
    lora_rs: bool = False
    lora_dropout: float = 0.0

    @property
    def scale(self) -> float:
        """Return what B A is multiplied by."""
        return scale_of(self.lora_rank, self.lora_alpha, self.lora_rs)


def scale_of(rank: int, alpha: float, rank_stabilised: bool) -> float:
    """Return what B A is multiplied by."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name is A or B of an adapter."""
    return factor_of(name) is not None


def factor_of(name: str) -> str | None:
    """Return "lora_A" or "lora_B" for the parameter of an adapter, None for any other."""
    match = _ADAPTER.fullmatch(name)
    return match[2] if match else None


def factor_name(weight: str, factor: str) -> str:
    """Return the name of A or B of the weight of this name: `factor` is "lora_A" or "lora_B"."""
    layer = weight.removesuffix(".weight")
    return f"{weight}_{factor}" if layer == weight else f"{layer}.{factor}.weight"


def adapter_rows(config: ModelConfig, lora: LoraSettings) -> Iterator[Parameter]:
    """Yield the rows of A and B of every weight that has an adapter, in the order of the weights."""
    for row in adapted_rows(config, lora):
        yield from factor_rows(row, lora.lora_rank)


def adapted_rows(config: ModelConfig, lora: LoraSettings) -> Iterator[Parameter]:
    """Yield the rows of the weights that have an adapter."""
    return (row for row in parameters(config) if is_adapted(config, row, lora))


def is_adapted(config: ModelConfig, row: Parameter, lora: LoraSettings) -> bool:
    """Return whether the weight of `row` has an adapter."""
    return _adaptable(row) and any(_matches(config, row, target) for target in lora.lora_target)


def factor_rows(row: Parameter, rank: int) -> tuple[Parameter, Parameter]:
    """Return the rows of A and B of one weight."""
    *experts, rows, columns = row.shape
    number = max(1, len(row.stacked))  # of matrices that are stacked along the outputs, each with an A of its own
    per_expert = row.active / row.size if row.size else 0.0
    out, last = len(experts), len(experts) + 1

    def factor(which: str, shape: tuple[int, ...], without: int) -> Parameter:
        divisions = tuple(division for division in row.placement.divisions if division.dim != without)
        stacked = tuple(f"{projection}.{which}" for projection in row.stacked)
        return Parameter(factor_name(row.name, which), shape, _placement(row.placement, divisions), row.layer, gemms=1,
                         active=round(per_expert * math.prod(shape)), stacked=stacked)

    return (factor(A, (*experts, number * rank, columns), out), factor(B, (*experts, rows, rank), last))


def _placement(whole: Placement, divisions: tuple[Division, ...]) -> Placement:
    if divisions == whole.divisions:
        return whole
    return Placement(f"{whole.name}, of one side", divisions) if divisions else REPLICATED


def _adaptable(row: Parameter) -> bool:
    """Return whether it is the matrix of a product in a layer: not the embedding, the head, a norm or a bias."""
    return row.layer is not None and row.gemms > 0


def _matches(config: ModelConfig, row: Parameter, target: str) -> bool:
    if target in GROUPS:
        group = group_of(config, row)
        return group == target or (target == ALL and group in _IN_ALL)
    return any(path == target or path.endswith(f".{target}") or fnmatchcase(path, target) for path in _paths(row))


def group_of(config: ModelConfig, row: Parameter) -> str:
    """Return the group of targets that the weight of a layer belongs to."""
    if row.layer >= config.num_hidden_layers:
        return MTP
    if ".self_attn." in row.name:
        return ATTENTION
    if row.stacked:
        return EXPERTS
    return ROUTER if row.name.endswith(".mlp.gate.weight") else MLP


def _paths(row: Parameter) -> Iterator[str]:
    """Yield the names of the layer that `row` is of; of stacked experts also those of each expert's projections."""
    yield row.name.removesuffix(".weight")
    for projection in row.stacked:
        yield f"{row.name.rpartition('.')[0]}.{projection}"


def matches_nothing(config: ModelConfig, targets: Sequence[str]) -> str | None:
    """Return in words the first target that no layer of the model has, and what there is like it; None if all match."""
    adaptable = [row for row in parameters(config) if _adaptable(row)]
    for target in targets:
        if not any(_matches(config, row, target) for row in adaptable):
            near = near_names(target, known_targets(config), _NEAR)
            return f"{target} matches no linear layer of this model" + (f"; it has {', '.join(near)}" if near else "")
    return None


def known_targets(config: ModelConfig) -> list[str]:
    """Return the groups and the short names that a target of this model can be."""
    adaptable = [row for row in parameters(config) if _adaptable(row)]
    groups = [group for group in GROUPS if any(_matches(config, row, group) for row in adaptable)]
    return groups + list(dict.fromkeys(path.rpartition(".")[2] for row in adaptable for path in _paths(row)))


def describe_adapters(config: ModelConfig, lora: LoraSettings) -> str:
    """Return a line on what is trained and which layers it is beside."""
    rows = list(adapter_rows(config, lora))
    layers = dict.fromkeys(_short_name(row) for row in adapted_rows(config, lora))
    size, base = sum(row.size for row in rows), sum(row.size for row in parameters(config))
    return (f"LoRA of rank {lora.lora_rank}, scale {lora.scale:g}, on {', '.join(layers)}: {size:,} parameters in "
            f"{len(rows)} tensors are trained, {base:,} are frozen")


def _short_name(row: Parameter) -> str:
    """Return the last names of a layer: mlp.gate_proj and shared_experts.gate_proj are two kinds."""
    return ".".join(name for name in next(_paths(row)).split(".")[-2:] if not name.isdecimal())
