"""How evenly experts are used: the tokens of each expert of each layer, counted over the steps between reports.

The violation of a layer is how far its busiest expert is above the mean: max(counts) / mean(counts) - 1, 0 where all
are equal (MaxVio of arXiv 2408.15664, section 4.1). V3's report shows such counts, relative to the mean (appendix C).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepseek.runtime.metrics import read_metrics

FILE = "expert_load.jsonl"


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """The tokens of each expert in the `steps` steps up to `iteration`: a list of counts by the layer's number.

    MTP modules have the numbers behind the last layer's.
    """

    iteration: int
    steps: int
    counts: Mapping[int, list[int]]

    @property
    def violation(self) -> dict[int, float]:
        """Return the violation of each layer."""
        return {layer: max(counts) * len(counts) / sum(counts) - 1 for layer, counts in self.counts.items()}

    @property
    def max_violation(self) -> float:
        """Return that of the layer with the largest."""
        return max(self.violation.values())


def to_record(load: ExpertLoad, with_counts: bool) -> dict[str, Any]:
    """Return a line of expert_load.jsonl; the counts, of which V3 has 15,000, are not in every one."""
    record = {"iteration": load.iteration, "steps": load.steps,
              "violation": {str(layer): value for layer, value in load.violation.items()}}
    return record | ({"tokens": {str(layer): row for layer, row in load.counts.items()}} if with_counts else {})


@dataclass(frozen=True, eq=False)
class LoadHistory:
    """What expert_load.jsonl says: (iteration, violation by layer) of each line, and the last counts, if any."""

    violations: list[tuple[int, dict[int, float]]]
    last: ExpertLoad | None

    def after(self, load: ExpertLoad) -> "LoadHistory":
        return LoadHistory([*self.violations, (load.iteration, load.violation)], load)


def read_history(path: Path) -> LoadHistory:
    """Read expert_load.jsonl, of lines of one iteration the last; raise ValueError for what is no such file."""
    violations, last = {}, None
    try:
        for record in read_metrics(path):
            violations[record["iteration"]] = {int(layer): float(value)
                                               for layer, value in record["violation"].items()}
            if "tokens" in record:
                counts = {int(layer): [int(count) for count in row] for layer, row in record["tokens"].items()}
                last = ExpertLoad(record["iteration"], int(record["steps"]), counts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of experts' load: {json.dumps(str(error))}") from error
    return LoadHistory([*violations.items()], last)
