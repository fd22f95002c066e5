"""Megatron's pipeline layout strings: which parts of a model each stage holds.

`E` is the embedding, `t` a decoder layer, `m` an MTP module, `L` the output head with the loss, `|` ends a stage, `x*3`
and `(tt|)*3` repeat, commas and blanks are ignored: "Ettt|(tt|)*29,m|L" is DeepSeek-V3 over 32 stages. A stage with
nothing in it, as in "E|tt||ttL", passes on what it receives: Megatron's way to give a rank less to do. The grammar is
that of megatron.core's PipelineParallelLayerLayout (importing that costs seconds); beyond it, repetitions may nest and
MTP modules may sit on several stages.
"""

import re
from dataclasses import dataclass

_LONGEST = 100_000  # characters of an expanded string: a typo like t*999999999 must not fill the memory
_GROUP = re.compile(r"\(([^()]*)\)\*(\d+)")
_LETTER = re.compile(r"([EtmL|])\*(\d+)(?!\*)")


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds, in the order of the forward pass.

    `layers` are decoder layer ids, `mtp` are depths counted from 0, `loss` is the output head with all losses.
    """

    embedding: bool
    layers: tuple[int, ...]
    mtp: tuple[int, ...]
    loss: bool

    @property
    def holds_anything(self) -> bool:
        """Return False for a stage that passes on what it receives, and has no parameters."""
        return bool(self.embedding or self.layers or self.mtp or self.loss)


def parse(text: str, num_layers: int, mtp_layers: int = 0) -> tuple[Stage, ...]:
    """Return the stages that `text` describes, after checking that it has every part of the model once and in order.

    The first stage, which receives token ids, must have the embedding; the last one, which computes the loss, the head.
    Raise ValueError otherwise.
    """
    stages = expand(text).split("|")
    parts = "".join(stages)
    for letter, name, expected in (("t", "--num-layers", num_layers), ("m", "--mtp-num-layers", mtp_layers)):
        if parts.count(letter) != expected:
            raise _error(text, f"has {parts.count(letter)} {letter}, but {name} is {expected}")
    if parts != "E" + "t" * num_layers + "m" * mtp_layers + "L":
        raise _error(text, "is not in the order of a model: one E first, then every t, then every m, one L last")
    for place, stage, letter in (("first", stages[0], "E"), ("last", stages[-1], "L")):
        if letter not in stage:
            raise _error(text, f"has no {letter} on its {place} stage, {stage!r}; those between may be empty")
    return _number(stages)


def count_stages(text: str) -> int:
    return expand(text).count("|") + 1


def expand(text: str) -> str:
    """Return `text` without repetitions, commas and blanks: "E(t|)*2L" is "Et|t|L"."""
    result, before = re.sub(r"[,\s]", "", text), None
    while result != before:
        before = result
        for pattern in (_LETTER, _GROUP):
            grown = sum(len(part) * int(times) for part, times in pattern.findall(result))
            if grown > _LONGEST:
                raise _error(text, f"repeats something into {grown} characters")
            result = pattern.sub(lambda match: match.group(1) * int(match.group(2)), result)
    unknown = re.search(r"[^EtmL|]", result)
    if unknown:
        raise _error(text, f"holds {unknown.group()!r}; the parts are E, t, m, L, |, *n and (...)*n")
    return result


def to_string(stages: tuple[Stage, ...]) -> str:
    """Return the layout string of `stages`, without repetitions."""
    return "|".join("E" * s.embedding + "t" * len(s.layers) + "m" * len(s.mtp) + "L" * s.loss for s in stages)


def _number(stages: list[str]) -> tuple[Stage, ...]:
    result, layers, depths = [], 0, 0
    for part in stages:
        t, m = part.count("t"), part.count("m")
        result.append(Stage(embedding="E" in part, layers=tuple(range(layers, layers + t)),
                            mtp=tuple(range(depths, depths + m)), loss="L" in part))
        layers, depths = layers + t, depths + m
    return tuple(result)


def _error(text: str, problem: str) -> ValueError:
    return ValueError(f"--pipeline-model-parallel-layout {text!r} {problem}")


def to_short_string(stages: tuple[Stage, ...]) -> str:
    """Return the layout string of `stages` with repetitions: "Et*3|(tttt|)*14,tmL"."""
    texts = to_string(stages).split("|")
    found, place = "", 0
    while place < len(texts):
        count = 1
        while place + count < len(texts) - 1 and texts[place + count] == texts[place]:
            count += 1
        last = place + count >= len(texts)
        found += texts[place] if last else f"({texts[place]}|)*{count}" if count > 1 else f"{texts[place]}|"
        place += count
    assert count_stages(found) == len(stages), (found, stages)
    return found
