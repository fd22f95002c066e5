"""Pieces of a template to ids and loss weights, with control tokens resolved by their strings in the tokenizer.

The text between two control tokens is tokenised as one, as the release's tokenizer does, and apart from all others.
Where it is partly trained, a token carries the weight of the trained part that it reaches into.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_deepseek.data.tokenizer import ASSISTANT, BOS, EOD, SPECIAL_TOKENS, USER, HuggingFaceTokenizer, Tokenizer
from megatron_deepseek.finetuning.conversation import BadRow, Conversation
from megatron_deepseek.finetuning.templates import END_THINK, TEMPLATES, THINK, TOOL_TOKENS, Piece, Rules, Template
from megatron_deepseek.foreign_json import read_object

Run = tuple[int, float]


@dataclass
class Encoded:
    """The ids of one conversation, and its runs: so many tokens in turn with that loss weight."""

    ids: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def add(self, ids: list[int], weight: float):
        self.ids += ids
        self.add_run(len(ids), weight)

    def add_run(self, count: int, weight: float):
        if self.runs and self.runs[-1][1] == weight:
            self.runs[-1] = (self.runs[-1][0] + count, weight)
        elif count:
            self.runs.append((count, weight))

    @property
    def trained(self) -> int:
        """Return how many labels carry loss: the first token is no label."""
        return sum(count for count, weight in self.runs if weight) - bool(self.runs and self.runs[0][1])

    def cut(self, length: int) -> "Encoded":
        """Return the first `length` tokens."""
        short = Encoded(self.ids[:length])
        for count, weight in self.runs:
            short.add_run(min(count, length), weight)
            length -= min(count, length)
        return short


class Encoder:
    """Turns conversations into ids. Raise ValueError for a tokenizer that lacks a token of the template."""

    def __init__(self, tokenizer: Tokenizer, template: Template, rules: Rules, name: str = "tokenizer"):
        self.tokenizer, self.template, self.rules = tokenizer, template, rules
        self.control = control_ids(tokenizer)
        missing = [token for token in template.control if token not in self.control]
        if missing:
            raise ValueError(f"--template {template.name} does not fit --tokenizer-model {name}: {missing[0]} is no "
                             f"token there; name the template that the model was trained with, or its tokenizer")
        markers = [token for token in (BOS, EOD, USER, ASSISTANT, *TOOL_TOKENS) if token in self.control]
        written = isinstance(tokenizer, HuggingFaceTokenizer)  # where a token written out in a text is read as one
        self._markers = re.compile("|".join(map(re.escape, markers))) if written else None

    def encode(self, conversations: list[Conversation]) -> list[Encoded | BadRow]:
        """Return what each conversation becomes. All texts go to the tokenizer at once."""
        return self.encode_pieces([self._render(each) for each in conversations])

    def prompt(self, conversation: Conversation, thinking: bool) -> list[int]:
        """Return the ids that ask for the answer to a conversation that ends in a user's or tool's turn."""
        (encoded,) = self.encode_pieces([self.template.prompt(conversation, thinking, self.rules)])
        if isinstance(encoded, BadRow):
            raise encoded
        return encoded.ids

    def _render(self, conversation: Conversation) -> list[Piece] | BadRow:
        try:
            return self.template.render(conversation, self.rules)
        except BadRow as error:
            return error

    def encode_pieces(self, rendered: list[list[Piece] | BadRow]) -> list[Encoded | BadRow]:
        """Return the ids and runs of each list of pieces."""
        parts, plain, mixed = [], [], []
        for pieces in rendered:
            try:
                parts.append(self._parts(pieces, plain, mixed))
            except BadRow as error:
                parts.append(error)
        plain_ids = iter(self.tokenizer.encode_batch(plain) if plain else ())
        mixed_ids = iter(self._encode_mixed(mixed))
        return [own if isinstance(own, BadRow) else _join(own, plain_ids, mixed_ids) for own in parts]

    def _parts(self, pieces, plain: list[str], mixed: list[list[Piece]]) -> list:
        """Return the parts of a conversation: (id, weight) of a control token, a weight of a text that was appended to
        `plain`, or None for one that was appended to `mixed`. Nothing is appended if BadRow is raised.
        """
        if isinstance(pieces, BadRow):
            raise pieces
        own, texts, blends, run = [], [], [], []
        for piece in (*pieces, None):
            if piece is not None and not piece.control:
                self._check(piece.text)
                run.append(piece)
                continue
            if run and all(each.weight == run[0].weight for each in run):
                texts.append("".join(each.text for each in run))
                own.append(run[0].weight)
            elif run:
                blends.append(run)
                own.append(None)
            run = []
            if piece is not None:
                own.append((self._id_of(piece.text), piece.weight))
        plain += texts
        mixed += blends
        return own

    def _check(self, text: str):
        found = self._markers.search(text) if self._markers is not None and "<" in text else None
        if found is not None:
            raise BadRow("control token in a text", f"a text holds the control token {found.group()}, which would end "
                                                    "or begin a message; remove it from the text")

    def _id_of(self, token: str) -> int:
        if token not in self.control:
            raise BadRow("token not in the tokenizer", f"the row needs the control token {token}, which the tokenizer "
                                                       "lacks; remove the row")
        return self.control[token]

    def _encode_mixed(self, mixed: list[list[Piece]]) -> list[Encoded]:
        """Return the ids of texts of which some parts are trained and others not."""
        if not mixed or not isinstance(self.tokenizer, HuggingFaceTokenizer):
            return [_apart(self.tokenizer, run) for run in mixed]
        texts = ["".join(piece.text for piece in run) for run in mixed]
        encodings = self.tokenizer.backend.encode_batch(texts, add_special_tokens=False)
        return [_by_offsets(encoding.ids, encoding.offsets, run) for encoding, run in zip(encodings, mixed)]


def _join(parts: list, plain_ids, mixed_ids) -> Encoded:
    encoded = Encoded()
    for part in parts:
        if isinstance(part, tuple):
            encoded.add([part[0]], part[1])
        elif part is None:
            more = next(mixed_ids)
            encoded.ids += more.ids
            for run in more.runs:
                encoded.add_run(*run)
        else:
            encoded.add(next(plain_ids), part)
    return encoded


def _apart(tokenizer: Tokenizer, run: list[Piece]) -> Encoded:
    """Return the pieces' ids where a token never reaches over a border: bytes."""
    encoded = Encoded()
    for piece, ids in zip(run, tokenizer.encode_batch([piece.text for piece in run])):
        encoded.add(ids, piece.weight)
    return encoded


def _by_offsets(ids: list[int], offsets, run: list[Piece]) -> Encoded:
    encoded, place, end, last = Encoded(ids), 0, len(run[0].text), len(run) - 1
    for begin, stop in offsets:
        while begin >= end and place < last:
            place += 1
            end += len(run[place].text)
        weight, reached, upto = run[place].weight, place, end
        while stop > upto and reached < last:  # into the next piece
            reached += 1
            upto += len(run[reached].text)
            weight = max(weight, run[reached].weight)
        encoded.add_run(1, weight)
    return encoded


def control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the control tokens that the tokenizer has, by their strings; its bos and eod count as such."""
    names = (*SPECIAL_TOKENS, THINK, END_THINK, *TOOL_TOKENS)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        found = {name: tokenizer.backend.token_to_id(name) for name in names}
    elif not hasattr(tokenizer, "decode") or tokenizer.bos is None:
        found = {}
    else:
        found = {name: 256 + place for place, name in enumerate(SPECIAL_TOKENS)}
    return {name: identity for name, identity in found.items() if identity is not None}


def choose_template(name: str, tokenizer: Tokenizer, model: str | None) -> Template:
    """Return the template of that name; for "auto" the one that the tokenizer's own template and tokens tell."""
    if name != "auto":
        return TEMPLATES[name]
    control, own = control_ids(tokenizer), _chat_template(model)
    thinks = THINK in control
    if USER not in control:
        found = "deepseek-v2" if own is None or "User: " in own else None
    elif own is None:
        found = None if thinks else "deepseek-v3"
    elif "thinking" in own or f"{ASSISTANT}{END_THINK}" in own:
        found = "deepseek-v3.1"
    else:
        found = "deepseek-r1" if thinks and END_THINK in own else "deepseek-v3"
    if found is None or not {BOS, EOD} <= set(control):
        raise ValueError(f"--template auto: the tokenizer (--tokenizer-model {model}) does not tell which template its "
                         f"model was trained with; name one of {', '.join(TEMPLATES)}")
    return TEMPLATES[found]


def _chat_template(model: str | None) -> str | None:
    """Return the Jinja template beside a tokenizer.json, None where there is none."""
    folder = Path(model or ".")
    folder = folder if folder.is_dir() else folder.parent
    if model is not None and (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if model is None or not (folder / "tokenizer_config.json").is_file():
        return None
    own = read_object(folder / "tokenizer_config.json").fields.get("chat_template")
    return own if isinstance(own, str) else None
