"""Documents too long to hold whole: a JSON line of 200 MB would need up to five times that as a string.

Such a line is put into a file that is mapped. Its long strings are replaced by short markers, the rest is parsed as
usual, and each marker becomes a `LongText` that decodes its bytes piece by piece whenever it is read.
"""

import json
import mmap
from collections.abc import Callable, Iterator

LONG_LINE_BYTES = 1 << 23
LONG_STRING_BYTES = 1 << 20
MOST_OTHER_BYTES = 1 << 25
PIECE_BYTES = 1 << 20
UNPARSED = ("malformed JSON", "invalid UTF-8")  # reasons of a line that is no JSON at all
MARKER = "\udc00"  # half a surrogate pair: no text that is accepted holds one


class BadDocument(ValueError):
    """A document that cannot be used: `reason` is one of a few, for counting; the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class LongText:
    """The text in the bytes [start, end) of `data`. Reading it raises BadDocument where they are no text."""

    def __init__(self, data: mmap.mmap, start: int, end: int, cut: Callable, decode: Callable[[bytes], str]):
        self.data, self.start, self.end = data, start, end
        self._cut, self._decode = cut, decode

    def pieces(self) -> Iterator[str]:
        """Yield strings of at most PIECE_BYTES characters that join to the text."""
        start = self.start
        while start < self.end:
            stop = start + PIECE_BYTES
            stop = self._cut(self.data, start, stop) if stop < self.end else self.end
            yield self._decode(self.data[start:stop])
            start = stop


def plain_text(data: mmap.mmap, start: int = 0) -> LongText:
    return LongText(data, start, len(data), _cut_between_characters, decode_utf8)


def json_text(data: mmap.mmap, start: int, end: int) -> LongText:
    return LongText(data, start, end, _cut_between_escapes, _decode_json_string)


def decode_utf8(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadDocument("invalid UTF-8", f"invalid UTF-8: {error.reason} at byte {error.start}") from error


def _decode_json_string(content: bytes) -> str:
    try:
        return json.loads('"' + decode_utf8(content) + '"')
    except BadDocument:
        raise
    except ValueError as error:
        raise BadDocument("malformed JSON", f"malformed JSON in a long string: {error}") from error


def _cut_between_characters(data, start: int, stop: int) -> int:
    """Return the last place in (start, stop] where a character of UTF-8 begins."""
    for place in range(stop, max(start, stop - 4), -1):
        if data[place] & 0xC0 != 0x80:
            return place
    return stop  # no UTF-8, which decoding will report


def _cut_between_escapes(data, start: int, stop: int) -> int:
    stop = _cut_between_characters(data, start, stop)
    slash = data.rfind(b"\\", max(start, stop - 5), stop)
    if slash >= 0 and _begins_escape(data, slash):
        stop = slash if slash + (6 if data[slash + 1:slash + 2] == b"u" else 2) > stop else stop
    pair = stop - 6
    if pair > start and data[pair:pair + 3].lower() == b"\\ud" and data[pair + 3:pair + 4] in b"89abAB":
        stop = pair if _begins_escape(data, pair) else stop  # the first half of a surrogate pair
    return stop


def _begins_escape(data, slash: int) -> bool:
    """Return whether the backslash at `slash` is not escaped itself: an even number of them comes before it."""
    return _slashes_before(data, slash) % 2 == 0


def _slashes_before(data, place: int) -> int:
    count = 0
    while place - count > 0 and data[place - count - 1] == 0x5C:
        count += 1
    return count


def parse_long_line(data: mmap.mmap):
    """Return what json.loads would, but a `LongText` for every string value longer than LONG_STRING_BYTES.

    Raise BadDocument for malformed JSON and for a line with too many bytes outside of long strings.
    """
    skeleton, texts, position = bytearray(), {}, 0
    while position < len(data):
        quote = data.find(b'"', position)
        between = (quote if quote >= 0 else len(data)) - position
        if len(skeleton) + between > MOST_OTHER_BYTES:
            raise BadDocument("too large", f"the line has {len(data)} bytes, more than {MOST_OTHER_BYTES} of them "
                                           f"outside of long strings")
        skeleton += data[position:position + between]
        if quote < 0:
            break
        end = _string_end(data, quote + 1)
        if end - quote > LONG_STRING_BYTES:
            marker = f"{MARKER}{len(texts)}"
            texts[marker] = json_text(data, quote + 1, end)
            skeleton += json.dumps(marker).encode()
        else:
            skeleton += data[quote:end + 1]
        position = end + 1
    return _with_texts(parse_json(bytes(skeleton)), texts)


def _string_end(data: mmap.mmap, place: int) -> int:
    """Return the place of the quote that ends the string whose inside begins at `place`."""
    while True:
        place = data.find(b'"', place)
        if place < 0:
            raise BadDocument("malformed JSON", "malformed JSON: a string has no end")
        if _slashes_before(data, place) % 2 == 0:
            return place
        place += 1


def _with_texts(value, texts: dict[str, LongText]):
    if isinstance(value, dict):
        return {key: _with_texts(entry, texts) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_texts(entry, texts) for entry in value]
    return texts.get(value, value) if isinstance(value, str) else value


def parse_json(content: bytes):
    """Return json.loads of UTF-8 bytes, without the byte order mark that may come first; raise BadDocument."""
    try:
        return json.loads(decode_utf8(content).removeprefix("\ufeff"))
    except BadDocument:
        raise
    except RecursionError as error:
        raise BadDocument("malformed JSON", "malformed JSON: nested too deeply") from error
    except ValueError as error:
        raise BadDocument("malformed JSON", f"malformed JSON: {error}") from error
