"""From files to rows: the door through which a run, a dry run or a benchmark gets its fine-tuning data."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_deepseek.finetuning.settings import DataSettings


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a dataset.

    `rows` were read, `samples` are left; `dropped` counts the others by reason (over-long ones, bad ones, those without
    loss); `bad` are the first messages of bad rows, each with file and line. `tokens` and `trained` are sums over the
    samples, `trained` of tokens with a loss weight.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """Tokenised datasets. `prefixes` are their indexed files, `names` what the user calls them, `weights` the blend's.

    `template` is the one that was used, never "auto"; `mask_rule` says in a line what carries loss.
    """

    settings: DataSettings
    template: str
    mask_rule: str
    prefixes: tuple[str, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    counts: tuple[Counts, ...]
    pad: int


def prepare(settings: DataSettings, say: Callable[[str], None] = print) -> Prepared:
    """Tokenise what the cache does not hold yet, and return where it lies.

    Safe for any number of processes on any number of nodes that share the cache: one works, the others wait for it. A
    run that has ranks should call it on one rank first. Raise ValueError, in one line, for whatever is wrong.
    """
    raise NotImplementedError


def refuse_same(train: Prepared, evaluation: Prepared) -> None:
    """Raise ValueError where an evaluation set holds the same samples as the training set."""
    raise NotImplementedError
