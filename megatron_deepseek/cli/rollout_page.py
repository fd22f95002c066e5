"""Samples of GRPO as one HTML file, rollouts.html with the samples in it: it loads nothing and sends nothing."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_deepseek.cli.rollout_records import Kept, Step

_PAGE = Path(__file__).with_name("rollouts.html")
_DATA = "{{samples}}"


def page(steps: Sequence[tuple[Step, Sequence[Sequence[Kept]]]]) -> str:
    """Return the page of some steps, each with the groups of samples that are shown."""
    content = [{"step": step.number, "summary": step.summary(), "groups": [_group(each) for each in groups]}
               for step, groups in steps]
    return _PAGE.read_text(encoding="utf-8").replace(_DATA, _in_script(content))


def _group(group: Sequence[Kept]) -> dict:
    return {"group": group[0].group, "prompt": group[0].prompt, "samples": [_sample(each) for each in group]}


def _sample(sample: Kept) -> dict:
    reasoning, answer = sample.parts
    return {"reasoning": reasoning, "answer": answer, "tokens": sample.tokens, "finish": sample.finish_reason,
            "reward": sample.reward, "advantage": sample.advantage, "rewards": dict(sample.rewards),
            "drift": sample.drift, "log_probability": sample.log_probability}


def _in_script(value: object) -> str:
    """Return JSON that may stand in a script element: no text of a model can end it, or open a comment."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace(
        "\u2029", "\\u2029")
