"""WikiText's files (wiki.train.tokens; Merity et al. 2016): articles one after the other, in plain text with headings.

Headings stand alone, between blank lines: ` = Title = ` begins an article, ` = = Section = = ` and so on its parts.
Words are apart from punctuation by blanks, and `@-@`, `@,@`, `@.@` stand within words and numbers.
"""

import re
from collections.abc import Callable, Iterable, Iterator

from megatron_deepseek.data.preprocess.streams import DamagedStream

MOST_BYTES = 1 << 26  # of an article; the longest of WikiText-103 has less than a MB
TITLE = re.compile(rb"\s*= (?!= )\S(.*\S)? =\s*")

# How words are joined again, in this order: MindFormers' wikitext_clean, after Megatron-LM's detokenizer of WikiText.
JOINED = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" .", "."), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
    *((re.compile(rf"{first}\s*([^{last}]*?)\s*{last}"), rf"{kept[0]}\1{kept[1]}") for first, last, kept in
      ((r"\(", r"\)", "()"), (r"\[", r"\]", "[]"), ("{", "}", "{}"), ('"', '"', '""'), ("'", "'", "''"))),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "),
    (" 's", "'s"),
)

Line = tuple[int, int, bytes]  # the byte where it begins, its number from 1, its content


def documents(lines: Iterable[Line], unit: str) -> Iterator[Line]:
    """Yield the articles of a file as they are, titles included; or, by `unit`, the text of each section alone.

    A section is what stands between headings and blank lines, as MindFormers' wikitext_to_bin takes it. What comes
    before the first title is a document, too. Raise DamagedStream for a file that has no heading, or none for
    MOST_BYTES.
    """
    articles, headings, others = unit == "article", 0, 0
    for gathered in _gathered(lines, _begins_article if articles else _begins_block):
        place, number, first = gathered[0]
        is_heading = bool(TITLE.fullmatch(first)) if articles else first.strip().startswith(b"=")
        headings, others = headings + is_heading, others + (not is_heading)
        if articles or not is_heading:
            yield place, number, b"".join(content for _, _, content in gathered)
    if others and not headings:
        raise DamagedStream("no line ' = Title = ' is in it, with which WikiText's articles begin")


def _begins_article(previous: bytes, line: bytes, following: bytes) -> bool:
    return not previous.strip() and not following.strip() and TITLE.fullmatch(line) is not None


def _begins_block(previous: bytes, line: bytes, following: bytes) -> bool:
    return not previous.strip()


def _gathered(lines: Iterable[Line], begins: Callable[[bytes, bytes, bytes], bool]) -> Iterator[list[Line]]:
    """Yield runs of lines, without the blank ones at their ends. `begins` is given the lines around each line, too."""
    gathered: list[Line] = []
    size, previous = 0, b""
    for line, following in _with_next(lines):
        if gathered and line[2].strip() and begins(previous, line[2], following):
            yield _without_blank_end(gathered)
            gathered, size = [], 0
        if gathered or line[2].strip():
            gathered.append(line)
            size += len(line[2])
        if size > MOST_BYTES:
            raise DamagedStream(f"no heading between blank lines in {MOST_BYTES >> 20} MB, as WikiText has them")
        previous = line[2]
    if gathered:
        yield _without_blank_end(gathered)


def _with_next(lines: Iterable[Line]) -> Iterator[tuple[Line, bytes]]:
    """Yield each line with the content of the next, b"" after the last."""
    held = None
    for line in lines:
        if held is not None:
            yield held, line[2]
        held = line
    if held is not None:
        yield held, b""


def _without_blank_end(gathered: list[Line]) -> list[Line]:
    while not gathered[-1][2].strip():
        gathered.pop()
    return gathered


def joined(text: str) -> str:
    """Return a section as prose: its words joined to their punctuation again.

    MindFormers does so with whole files, where one quotation mark without a partner turns all pairs behind it inside
    out.
    """
    text = f"\n{text}"
    for found, replacement in JOINED:
        text = text.replace(found, replacement) if isinstance(found, str) else found.sub(replacement, text)
    return text.strip("\n")
