"""Where two architectures differ in what a checkpoint must match: derived from what stands at each field (fields.py).

Values are compared as config.json writes them, since that is what a checkpoint keeps: parts of `rope_scaling` that its
kind does not use are no difference.
"""

import json
from collections.abc import Iterator
from typing import Any

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.fields import FORWARD, RULES, WEIGHTS, Rule


def differences(there: ModelConfig, here: ModelConfig, *matches: str) -> list[str]:
    """Return the fields that must match and do not, with both values; `matches`: WEIGHTS or FORWARD, both by default.
    """
    written = there.to_hf_dict().keys() | here.to_hf_dict().keys()
    theirs, ours = _values(there), _values(here)
    found = []
    for name, rule in RULES.items():
        said = name in written or rule.implied  # else no family of the two has such a field
        if rule.match in (matches or (WEIGHTS, FORWARD)) and said and theirs[name] != ours[name] and _matters(
                rule, there, here):
            found += _different(name, theirs[name], ours[name])
    return found


def _values(config: ModelConfig) -> dict[str, Any]:
    """Return all fields, as config.json writes those that it has."""
    return {name: list(value) if isinstance(value := getattr(config, name), tuple) else value
            for name in RULES} | config.to_hf_dict()


def _matters(rule: Rule, *configs: ModelConfig) -> bool:
    return rule.match_if is None or any(rule.match_if(config) for config in configs)


def _different(name: str, there: Any, here: Any) -> Iterator[str]:
    """Yield each difference of one field: of two objects those of their parts."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys((*there, *here)):
            if there.get(key) != here.get(key):
                yield f"{name} {key} {there.get(key)} there, {here.get(key)} here"
        return
    if isinstance(there, dict) or isinstance(here, dict):
        there, here = json.dumps(there), json.dumps(here)
    yield f"{name} {there} there, {here} here"
