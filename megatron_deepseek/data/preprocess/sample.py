"""Sample texts of the input, to compare tokenizer backends on and to learn sentence ends from."""

import numpy as np

from megatron_deepseek.data.preprocess.plan import Segment
from megatron_deepseek.data.preprocess.records import Record, SegmentReader
from megatron_deepseek.data.preprocess.settings import PreprocessSettings

MOST_SEGMENTS = 8
SAMPLE_CHARS = 1 << 17
HEAD_CHARS = 1 << 21
MOST_RECORDS = 10_000


def sample_texts(segments: list[Segment], settings: PreprocessSettings, whole: bool = False) -> list[str]:
    """Return up to SAMPLE_CHARS of text, from segments spread evenly over all and three places of each plain file.

    With `whole`, return instead up to HEAD_CHARS from the head of the input alone.
    """
    if whole:
        return _head(segments, settings, HEAD_CHARS)
    chosen = [segments[i] for i in np.unique(np.linspace(0, len(segments) - 1, MOST_SEGMENTS).astype(int))]
    places = [place for segment in chosen for place in _places(segment, settings.content.text_unit)]
    texts = []
    for place in places:
        texts += _head([place], settings, SAMPLE_CHARS // len(places))
    return texts


def _places(segment: Segment, text_unit: str) -> list[Segment]:
    if segment.spool is not None or not segment.input_file.is_splittable(text_unit):
        return [segment]
    size = segment.input_file.size
    starts = sorted({0, size // 3, size * 2 // 3})
    return [Segment(segment.input_file, start, size, lines_before=None if start else 0) for start in starts]


def _head(segments: list[Segment], settings: PreprocessSettings, chars: int) -> list[str]:
    texts, left, records = [], chars, 0
    for segment in segments:
        content = settings.content
        for record in SegmentReader(segment, content.json_keys, content.text_unit, settings.parts_directory):
            records += 1
            for text in _texts(record) if isinstance(record, Record) else ():
                texts.append(text[:left])
                left -= len(texts[-1])
            if left <= 0 or records >= MOST_RECORDS:
                return texts
    return texts


def _texts(record: Record):
    """Yield the texts of a record, of a long text its first piece."""
    for value in record.texts:
        yield from ([value] if isinstance(value, str) else value if isinstance(value, list)
                    else [next(value.pieces(), "")])
