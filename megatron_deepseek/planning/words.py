"""Tables for people: columns below each other, ranks in short, what a stage holds in words."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout_string import Stage


def in_short(numbers: Sequence[int]) -> str:
    """Write increasing numbers in short: "0-7", "0, 2, 4, 6", "0, 64, ... 960 (16 ranks)", "0-3, 8-11"."""
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    if len(texts) <= 4:
        return ", ".join(texts)
    return f"{texts[0]}, {texts[1]}, ... {texts[-1]} ({len(numbers)} ranks)"


def parts_of_stage(model: ModelConfig, stage: Stage) -> str:
    """Return what a stage holds, in words: "embedding, dense layers 0-2"."""
    parts = ["embedding"] * stage.embedding
    for has_experts, run in groupby(stage.layers, model.is_moe_layer):
        kind = "layers" if has_experts or not model.n_routed_experts else "dense layers"
        layers = list(run)
        parts.append(f"{kind if len(layers) > 1 else kind[:-1]} {in_short(layers)}")
    parts += [f"MTP {in_short([depth + 1 for depth in stage.mtp])}"] * bool(stage.mtp) + ["head"] * stage.loss
    return ", ".join(parts) or "nothing, passes on"


def aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a table whose columns begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()
