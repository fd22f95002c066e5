"""The settings of fine-tuning data: what decides the tokens, and what decides the rows. Nothing here imports torch."""

from dataclasses import dataclass

TEMPLATES = ("auto", "deepseek-v2", "deepseek-v3", "deepseek-r1", "deepseek-v3.1")
OVERLONG = ("drop", "truncate", "error")
HISTORY_REASONING = ("keep", "drop", "as-release")
SPLIT_TURNS = ("none", "reasoning")
CONVERSATIONS, PAIRS, LABELLED, SCORED = "conversations", "pairs", "labelled", "scored pairs"


@dataclass(frozen=True)
class DataSettings:
    """All that decides which rows a run trains on; each field is named after its option.

    `dataset` are files, globs, directories or entries of LLaMA-Factory (`dataset_info.json:name`), or weights and these
    in turn. `max_length` are the most tokens of a conversation, None for `seq_length`, the tokens of a row.
    `num_workers` processes tokenise. `option` is what messages call the list of files: --dataset or --eval-dataset.
    `kind` says what a row of the files is: CONVERSATIONS, PAIRS of a chosen and a rejected answer, LABELLED ones, good
    or bad, or SCORED pairs, whose last tokens have a place in the row too. All but CONVERSATIONS stand in rows two by
    two, so `max_length` is at most about half.
    """

    dataset: tuple[str, ...]
    tokenizer_type: str = "HuggingFaceTokenizer"
    tokenizer_model: str | None = None
    template: str = "auto"
    seq_length: int = 4096
    max_length: int | None = None
    overlong: str = "drop"
    packing: bool = True
    train_think_prefix: bool = False
    history_reasoning: str = "as-release"
    split_turns: str = "none"
    max_bad_rows: int = 0
    data_cache_path: str | None = None
    num_workers: int = 2
    seed: int = 1234
    option: str = "--dataset"
    kind: str = CONVERSATIONS

    def __post_init__(self):
        for name, value, choices in (("template", self.template, TEMPLATES), ("overlong", self.overlong, OVERLONG),
                                     ("history-reasoning", self.history_reasoning, HISTORY_REASONING),
                                     ("split-turns", self.split_turns, SPLIT_TURNS)):
            if value not in choices:
                raise ValueError(f"--{name} {value} is not one of {', '.join(choices)}")
        for name, value, least in (("seq-length", self.seq_length, 1), ("max-length", self.max_length or 2, 2),
                                   ("max-bad-rows", self.max_bad_rows, 0), ("num-workers", self.num_workers, 1)):
            if value < least:
                raise ValueError(f"--{name} {value} must be at least {least}")
        if self.together * (self.longest - (self.kind != SCORED)) > self.seq_length:
            twice = "; both sides of a pair share a row" if self.together > 1 else ""
            raise ValueError(f"--max-length {self.max_length} does not fit into rows of --seq-length {self.seq_length}"
                             f"{twice}")
        if not self.dataset:
            raise ValueError(f"{self.option} names no file")

    @property
    def longest(self) -> int:
        """Return the most tokens that a conversation may have."""
        return self.seq_length // self.together if self.max_length is None else self.max_length

    @property
    def together(self) -> int:
        """Return how many neighbouring samples always share a row."""
        return 1 if self.kind == CONVERSATIONS else 2
