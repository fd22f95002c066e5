"""--explain-layout: which rank holds what, and the table of what goes with what, which docs/compatibility.md has too.

`python -m megatron_deepseek.arguments.explain > docs/compatibility.md` writes the page.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence

from megatron_deepseek.arguments.explain_ranks import every_rank, pipeline_ranks, places_of_pipeline_rank
from megatron_deepseek.arguments.features import FEATURES, table
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.arguments.settings import parse_or_exit
from megatron_deepseek.arguments.validation import RULES
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.launch.program import program
from megatron_deepseek.parallel.layout_string import to_string
from megatron_deepseek.planning.node_reach import describe_reach
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.planning.state_bytes import describe_states
from megatron_deepseek.settings import Settings


def explain(settings: Settings, every: bool = False) -> Iterator[str]:
    """Yield lines that explain a layout: its sizes, its stages, and which rank holds what.

    `every`: each rank has a line of its own; otherwise equal ranks share one.
    """
    layout, model = settings.layout, settings.model
    yield (f"{layout.world_size} ranks: dense mesh pp {layout.pp} x dp {layout.dp} x cp {layout.cp} x tp {layout.tp}, "
           f"expert mesh pp {layout.pp} x edp {layout.edp} x ep {layout.ep} x etp {layout.etp}")
    stages = resolve(model, settings.pipeline, layout.pp, settings.data.seq_length)
    yield f"stages: {to_string(stages)}" + (f", {settings.pipeline.schedule}" if layout.pp > 1 else "")
    yield model.describe_parameters()
    yield describe_states(settings)
    yield from describe_reach(model, layout, settings.communication.moe_ranks_per_node or layout.world_size)
    yield ""
    yield from pipeline_ranks(settings)
    yield ""
    yield from every_rank(settings) if every else places_of_pipeline_rank(settings)


def explain_layout(argv: Sequence[str], parser: Callable[[], argparse.ArgumentParser] = build_parser) -> None:
    """Print the layout and leave where `argv` has --explain-layout RANKS; otherwise return."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--explain-layout", nargs="?", const="")
    asked.add_argument("--all", action="store_true")
    options = asked.parse_known_args(argv)[0]
    if options.explain_layout is None:
        return
    ranks = options.explain_layout if options.explain_layout.isdecimal() else "1"  # the parser refuses anything else
    settings = parse_or_exit(argv, {"WORLD_SIZE": ranks}, parser)

    def body() -> int:
        print("\n".join([*explain(settings, options.all), "", *goes_with_what(settings)]))
        return 0

    raise SystemExit(exit_status(program(), body))


def goes_with_what(settings: Settings) -> Iterator[str]:
    """Yield the lines of the table of features, those of this run marked."""
    used = frozenset(feature.name for feature in FEATURES if feature.used(settings))
    yield "what goes with what (* in this run; docs/compatibility.md has the arguments and the reasons)"
    yield from table(used)


_PAGE = """# What goes with what

Rendered by `python -m megatron_deepseek.arguments.explain`, and checked: `tests/parallel/test_compatibility.py` finds
for every dot a case with both features that some test compares with one process, and for every letter a command line
that is refused for that reason. Float64 tests compare losses, gradients, norms, expert counts and updated weights to
1e-9; bf16 compares losses to 2 %.
`pretrain_deepseek.py ... --explain-layout RANKS` prints the table with the features of that run marked.

```
{table}
```

## Features
| | feature | arguments |
|---|---|---|
{features}

## Validation rules
Every combination of arguments below is refused before anything is built, with the reason and the values. All that apply
are reported together, but for those that only follow from one that is.

| | rule | message |
|---|---|---|
{rules}
"""


def compatibility() -> str:
    """Return docs/compatibility.md: the tables of features and of validation rules, values of messages left out."""
    features = [f"| {n} | {feature.name} | {_code(feature.arguments) or 'ranks that no other argument takes'} |"
                for n, feature in enumerate(FEATURES, 1)]
    rules = [f"| {n} | {rule.name} | {_without_values(rule.message)} |" for n, rule in enumerate(RULES, 1)]
    return _PAGE.format(table="\n".join(table()), features="\n".join(features), rules="\n".join(rules))


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _without_values(message: str) -> str:
    return re.sub(r"\{r\.[^}]*\}", "N", message).replace("|", "\\|")


if __name__ == "__main__":
    print(compatibility(), end="")
