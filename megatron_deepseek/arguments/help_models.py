"""--help-models: the presets that --model takes, with their sizes."""

import argparse
from collections.abc import Iterator

from megatron_deepseek.model.architecture.presets import PRESETS, Preset

_HEADS = ("--model", "parameters", "active", "of MTP", "context", "model_type")
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_WIDTH = 118


class HelpModels(argparse.Action):
    """Print the presets and leave with status 0, as --help does, whatever else is given or missing."""

    def __init__(self, option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=None):
        super().__init__(option_strings, dest=dest, default=default, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.exit_with("\n".join(model_lines()) + "\n")


def model_lines() -> Iterator[str]:
    """Yield the lines of a table of all presets, the names on Hugging Face below each."""
    rows = [_HEADS, *(_row(preset) for preset in PRESETS)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    described = (None, *PRESETS)
    for row, preset in zip(rows, described):
        first, *numbers, last = row
        cells = (f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:]))
        yield "  ".join((f"{first:{widths[0]}}", *cells, last)).rstrip()
        if preset is not None:
            yield from _aliases(preset)
    yield ""
    yield "parameters: without MTP modules; active: those that one token is multiplied with; context: in tokens."
    yield "The names below a preset mean it too. --model also takes any Hugging Face config.json of these types."


def _row(preset: Preset) -> tuple[str, ...]:
    config = preset.config
    mtp = config.num_parameters() - config.main_parameters()
    return (preset.name, _size(config.main_parameters()), _size(config.num_active_parameters()),
            _size(mtp) if mtp else "-", f"{config.max_position_embeddings:,}", config.model_type)


def _aliases(preset: Preset) -> Iterator[str]:
    """Yield indented lines of at most _WIDTH characters."""
    line = ""
    for alias in preset.aliases:
        if line and len(line) + len(alias) + 2 > _WIDTH - 4:
            yield f"    {line},"
            line = ""
        line += f", {alias}" if line else alias
    if line:
        yield f"    {line}"


def _size(count: int) -> str:
    """Return a number of parameters in the unit that the reports use: "671.0B", "4.2M"."""
    unit, letter = next(((unit, letter) for unit, letter in _UNITS if count >= unit), (1, ""))
    return f"{count / unit:.{2 if letter == 'T' else 1}f}{letter}"
