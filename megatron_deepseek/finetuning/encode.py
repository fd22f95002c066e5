"""Pieces of a template to ids and loss weights, with control tokens resolved by their strings in the tokenizer.

The text between two control tokens is tokenised as one, as the release's tokenizer does, and apart from all others.
Where it is partly trained, a token carries the weight of the trained part that it reaches into.

gigatoken, where it is installed and gives the same ids, does the bulk of the work (data/preprocess/encoders.py). It has
no offsets, so the border between prompt and answer in a text is looked for first: if the ids of the whole begin with
those of the prompt alone, it lies behind them. `tokenizers`, with offsets, does the few others.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_deepseek.data.preprocess.encoders import choose_encoder
from megatron_deepseek.data.preprocess.settings import Content
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
        self._encode_texts = tokenizer.encode_batch
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

    def faster(self, conversations: Iterable[Conversation], workers: int, model: str,
               say: Callable[[str], None]) -> "Encoder":
        """Return an encoder with gigatoken if that gives the same ids for the texts of some conversations."""
        if not isinstance(self.tokenizer, HuggingFaceTokenizer):
            return self

        def sample() -> list[str]:
            rendered = map(self._render, conversations)
            return ["".join(piece.text for piece in pieces if not piece.control) for pieces in rendered
                    if not isinstance(pieces, BadRow)]

        chosen = choose_encoder(Content(tokenizer_model=model), "auto", workers, sample, say)
        if chosen.backend == "gigatoken":
            other = copy.copy(self)
            other._encode_texts = lambda texts: [ids.tolist() for ids in chosen.encode_batch(texts)]
            return other
        return self

    def encode_pieces(self, rendered: list[list[Piece] | BadRow]) -> list[Encoded | BadRow]:
        """Return the ids and runs of each list of pieces."""
        parts, texts = [], []
        for pieces in rendered:
            try:
                parts.append(self._parts(pieces, texts))
            except BadRow as error:
                parts.append(error)
        ids = iter(self._encode_texts(texts) if texts else ())
        return [own if isinstance(own, BadRow) else self._join(own, ids) for own in parts]

    def _parts(self, pieces, texts: list[str]) -> list:
        """Return the parts of a conversation: (id, weight) of a control token, the weight of a text, or the pieces of
        a text of which the end alone has loss. Append the texts to `texts`, of the last kind the whole and its
        beginning, unless BadRow is raised.
        """
        if isinstance(pieces, BadRow):
            raise pieces
        own, found, run = [], [], []
        for piece in (*pieces, None):
            if piece is not None and not piece.control:
                self._check(piece.text)
                run.append(piece)
                continue
            if run:
                found.append(run[0].text if len(run) == 1 else "".join(each.text for each in run))
                if all(each.weight == run[0].weight for each in run):
                    own.append(run[0].weight)
                else:
                    found.append("".join(each.text for each in run if not each.weight))
                    own.append(run)
                run = []
            if piece is not None:
                own.append((self._id_of(piece.text), piece.weight))
        texts += found
        return own

    def _join(self, parts: list, ids: Iterator[list[int]]) -> Encoded:
        encoded = Encoded()
        for part in parts:
            if isinstance(part, tuple):
                encoded.add([part[0]], part[1])
            elif isinstance(part, list):
                self._add_mixed(encoded, part, next(ids), next(ids))
            else:
                encoded.add(next(ids), part)
        return encoded

    def _add_mixed(self, encoded: Encoded, run: list[Piece], whole: list[int], beginning: list[int]):
        """Add a text that begins without loss and ends with it."""
        border = len(beginning)
        if whole[:border] == beginning and _begins_without_loss(run):
            encoded.add(beginning, 0.0)
            encoded.add(whole[border:], run[-1].weight)
        else:
            text = "".join(piece.text for piece in run)
            encoding = self.tokenizer.backend.encode(text, add_special_tokens=False)
            encoded.ids += encoding.ids
            for weight in _weights_by_offsets(encoding.offsets, run):
                encoded.add_run(1, weight)

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


def _begins_without_loss(run: list[Piece]) -> bool:
    """Return whether a text has one border, behind which all has the same weight."""
    weights = [piece.weight for piece in run]
    return weights[0] == 0 and sum(a != b for a, b in zip(weights, weights[1:])) == 1


def _weights_by_offsets(offsets: list[tuple[int, int]], run: list[Piece]) -> Iterator[float]:
    """Yield the weight of each token: the greatest of the pieces that it reaches into."""
    place, end, last = 0, len(run[0].text), len(run) - 1
    for begin, stop in offsets:
        while begin >= end and place < last:
            place += 1
            end += len(run[place].text)
        weight, reached, upto = run[place].weight, place, end
        while stop > upto and reached < last:
            reached += 1
            upto += len(run[reached].text)
            weight = max(weight, run[reached].weight)
        yield weight


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
    """Return the template of that name; for "auto" the one that the tokenizer's own template and tokens tell.

    R1's distilled models have Qwen's or Llama's tokenizer, with DeepSeek's tokens for roles and thoughts in place of
    theirs, but none for tools.
    """
    if name != "auto":
        return TEMPLATES[name]
    control, own = control_ids(tokenizer), _chat_template(model)
    thinks = THINK in control
    if USER not in control:
        found = "deepseek-v2" if own is None or "User: " in own else None
    elif own is None:
        found = "deepseek-v3" if not thinks else None if set(TOOL_TOKENS) & control.keys() else "deepseek-r1"
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
