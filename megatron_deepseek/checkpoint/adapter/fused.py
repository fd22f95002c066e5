"""The adapters of all routed experts of a layer as PEFT saves them with transformers 5, where experts are two stacks.

`mlp.experts.base_layer` is gate_up_proj's adapter and `mlp.experts` down_proj's; where only one of the stacks has an
adapter, it is `mlp.experts`. For E experts and rank R

    A [E*R, in]      row e*R + j is row j of expert e's A
    B [out, E*R]     column j*E + e is column j of expert e's B

Gate and up share an A. PEFT makes it of two, with a B that is zero where one would read the other's: such a pair is
taken apart into two of half the rank.
"""

import re
from collections.abc import Iterator

from megatron_deepseek.checkpoint.safetensors_file import StoredTensor, read_rows
from megatron_deepseek.foreign_json import JsonObject

_FUSED = re.compile(r"(.+\.mlp\.experts)(\.base_layer)?")
Rows = tuple[int, int]


def stack_of(layer: str, config: JsonObject) -> str | None:
    """Return the name of the stack of experts that a key's layer means, None for an ordinary layer."""
    match = _FUSED.fullmatch(layer)
    if match is None:
        return None
    named = [str(name) for name in config.list("target_parameters", default=None) or ()]
    alone = any(name.endswith("gate_up_proj") for name in named) and not any(
        name.endswith("experts.down_proj") or name == "down_proj" for name in named)
    return f"{match[1]}.{'gate_up_proj' if match[2] or alone else 'down_proj'}"


def experts(stack: str, rank: int, b: StoredTensor) -> Iterator[tuple[str, Rows, Rows, slice]]:
    """Yield the name of each expert's layer, the rows of its A and of its B, and the columns of its B.

    Raise ValueError unless B is of whole experts.
    """
    prefix, _, kind = stack.rpartition(".")
    (outputs, columns), width = b.shape, b.shape[0] // 2
    number = columns // rank
    if kind == "gate_up_proj" and outputs % 2:
        raise ValueError(f"{b.file}: {b.name} has {outputs} rows, which are not gate's and up's")
    halves = kind == "gate_up_proj" and _is_of_two(b, rank, number)
    for expert in range(number):
        first, last = expert * rank, (expert + 1) * rank
        whole, middle = slice(expert, columns, number), first + rank // 2
        if kind == "down_proj":
            yield f"{prefix}.{expert}.down_proj", (first, last), (0, outputs), whole
        elif halves:
            half = rank // 2 * number
            yield f"{prefix}.{expert}.gate_proj", (first, middle), (0, width), slice(expert, half, number)
            yield f"{prefix}.{expert}.up_proj", (middle, last), (width, outputs), slice(half + expert, columns, number)
        else:
            yield f"{prefix}.{expert}.gate_proj", (first, last), (0, width), whole
            yield f"{prefix}.{expert}.up_proj", (first, last), (width, outputs), whole


def _is_of_two(b: StoredTensor, rank: int, number: int) -> bool:
    """Return whether gate reads the first half of every expert's A alone, and up the second."""
    if rank % 2:
        return False
    gate, up = read_rows(b, 0, b.shape[0]).unflatten(1, (2, rank // 2, number)).chunk(2)
    return not (gate[:, 1].any() or up[:, 0].any())
