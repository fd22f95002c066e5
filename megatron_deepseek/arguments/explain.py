"""What a layout is, in words: which rank holds what, and the table of what goes with what; rendered into docs too.

`python -m megatron_deepseek.arguments.explain > docs/compatibility.md` writes the page.
"""

import argparse
import re
from collections.abc import Iterator, Sequence

from megatron_deepseek.arguments.features import FEATURES, table
from megatron_deepseek.arguments.refusals import REFUSALS
from megatron_deepseek.arguments.settings import Settings, parse_or_exit
from megatron_deepseek.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage, to_string
from megatron_deepseek.parallel.schedule_rules import stages_of_rank
from megatron_deepseek.planning.node_reach import describe_reach
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.planning.states import describe_states

_MOST_RANKS = 64  # rows of the mesh that are printed


def places(rank: int, layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Coordinates of `rank` on the dense mesh (pp, dp, cp, tp) and the expert mesh (pp, edp, ep, etp)."""
    result = []
    for axes in (("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")):
        rest, coordinates = rank, {}
        for axis in axes:
            rest, coordinates[axis] = divmod(rest, getattr(layout, axis))
        result.append(coordinates)
    return result[0], result[1]


def explain(settings: Settings) -> Iterator[str]:
    """Lines: the sizes, the stages, and a row for each rank."""
    layout, model = settings.layout, settings.model
    yield (f"{layout.world_size} ranks: dense mesh pp {layout.pp} x dp {layout.dp} x cp {layout.cp} x tp {layout.tp}, "
           f"expert mesh pp {layout.pp} x edp {layout.edp} x ep {layout.ep} x etp {layout.etp}")
    stages = resolve(model, settings.pipeline, layout.pp, settings.data.seq_length)
    yield f"stages: {to_string(stages)}" + (f", {settings.pipeline.schedule}" if layout.pp > 1 else "")
    yield from describe_reach(model, layout, settings.communication.moe_ranks_per_node or layout.world_size)
    yield "rank  pp dp cp tp  edp ep etp  stages     experts    chunks of a sequence"
    for rank in range(min(layout.world_size, _MOST_RANKS)):
        dense, expert = places(rank, layout)
        held = stages_of_rank(dense["pp"], len(stages), layout.pp, settings.pipeline.schedule)
        experts = _experts(model, layout, [stages[s] for s in held], expert["ep"])
        chunks = "all" if layout.cp == 1 else f"{dense['cp']}, {2 * layout.cp - 1 - dense['cp']} of {2 * layout.cp}"
        yield (f"{rank:4}  {dense['pp']:2} {dense['dp']:2} {dense['cp']:2} {dense['tp']:2}  {expert['edp']:3} "
               f"{expert['ep']:2} {expert['etp']:3}  {','.join(map(str, held)):9}  {experts:9}  {chunks}")
    if layout.world_size > _MOST_RANKS:
        yield f"... and so on, to rank {layout.world_size - 1}"


def _experts(model: ModelConfig, layout: Layout, stages: Sequence[Stage], place: int) -> str:
    """Which a rank at `place` of its expert group holds of each layer of `stages` that has any, and which part."""
    layers = [index for stage in stages for index in
              (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))]
    if not any(map(model.is_moe_layer, layers)):
        return "none"
    each = model.n_routed_experts // layout.ep
    return f"{place * each}-{place * each + each - 1}" + (f" 1/{layout.etp}" if layout.etp > 1 else "")


def explain_layout(argv: Sequence[str]) -> None:
    """For an entry point: with --explain-layout RANKS in `argv`, print what it asks for and leave."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--explain-layout", type=int)
    ranks = asked.parse_known_args(argv)[0].explain_layout
    if ranks is None:
        return
    settings = parse_or_exit(argv, {"WORLD_SIZE": str(ranks)})
    print("\n".join([*explain(settings), describe_states(settings), "", *goes_with_what(settings)]))
    raise SystemExit(0)


def goes_with_what(settings: Settings) -> Iterator[str]:
    """Lines: the table of features, those of this run marked."""
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

## Refusals
Every combination of arguments below is refused before anything is built, with the reason and the values; read from top
to bottom, the first that applies speaks.

| | name | refused, and why |
|---|---|---|
{refusals}
"""


def compatibility() -> str:
    """docs/compatibility.md: the table of features, and that of refusals with their values left out."""
    features = [f"| {n} | {feature.name} | {_code(feature.arguments) or 'ranks that no other argument takes'} |"
                for n, feature in enumerate(FEATURES, 1)]
    refusals = [f"| {n} | {refusal.name} | {_without_values(refusal.message)} |"
                for n, refusal in enumerate(REFUSALS, 1)]
    return _PAGE.format(table="\n".join(table()), features="\n".join(features), refusals="\n".join(refusals))


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _without_values(message: str) -> str:
    return re.sub(r"\{r\.[^}]*\}", "N", message).replace("|", "\\|")


if __name__ == "__main__":
    print(compatibility(), end="")
