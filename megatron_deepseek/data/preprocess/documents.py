"""The texts of documents to ids: sentences, fill-in-the-middle, begin and end tokens."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from megatron_deepseek.data.preprocess.cutting import encode_pieces, slices
from megatron_deepseek.data.preprocess.encoders import Encoder, check_ids
from megatron_deepseek.data.preprocess.fim import Rearrangement, draw_rearrangement
from megatron_deepseek.data.preprocess.long_text import BadDocument
from megatron_deepseek.data.preprocess.sentences import CHARACTERS_AT_ONCE
from megatron_deepseek.data.preprocess.settings import Content
from megatron_deepseek.data.preprocess.texts import Text, pieces, rejoined

MOST_TOKENS = np.iinfo(np.int32).max


class DocumentEncoder:
    """Encodes documents as `content` asks. `split` turns a text into sentences, or is None."""

    def __init__(self, content: Content, encoder: Encoder, split: Callable[[str], list[str]] | None):
        self.content, self.encoder, self.split = content, encoder, split
        self.special = encoder.special

    def encode(self, texts: list[Text], file_number: int, places: list[int]) -> tuple[np.ndarray, list[list[int]]]:
        """Return the ids of all sequences end to end, and each document's sequence lengths: none in an empty document.

        Raise ValueError where one of the texts cannot be encoded; the message doesn't say which.
        """
        arrangements = [self._arrangement(text, file_number, place) for text, place in zip(texts, places, strict=True)]
        sequences = [self._sequences_of(text, each) for text, each in zip(texts, arrangements)]
        encoded = iter(self.encoder.encode_batch([sequence for document in sequences for sequence in document]))
        arrays, lengths = [], []
        for document, arrangement in zip(sequences, arrangements):
            own = [next(encoded) for _ in document]
            if arrangement is not None:
                own = [arrangement.join(own, self.special.fim)]
            own = self._with_ends([ids for ids in own if len(ids)])
            arrays.extend(own)
            lengths.append([len(ids) for ids in own])
        ids = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        check_ids(ids, self.special.vocab_size)
        return ids, lengths

    def _arrangement(self, text: Text, file_number: int, place: int) -> Rearrangement | None:
        content = self.content
        if not content.fim_rate or not isinstance(text, str) or not text:
            return None
        return draw_rearrangement(content.seed, content.fim_rate, content.fim_spm_rate, file_number, place)

    def _sequences_of(self, text: Text, arrangement: Rearrangement | None) -> list[str]:
        if arrangement is not None:
            return arrangement.cut(text)
        if isinstance(text, list):
            return text
        return [text] if self.split is None else self.split(text)

    def _with_ends(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """Add BOS before the first and EOD after the last, in a document that has sequences."""
        if sequences and self.content.append_bos:
            sequences[0] = np.concatenate([[self.special.bos], sequences[0]])
        if sequences and self.content.append_eod:
            sequences[-1] = np.concatenate([sequences[-1], [self.special.eod]])
        return sequences

    def encode_long(self, text: Text, write: Callable[[np.ndarray], None]) -> list[int]:
        """Encode one document of any length, call `write` with its ids as they come, and return its sequence lengths.

        Raise ValueError at any moment; what was written of the document must then be discarded.
        """
        lengths, begun = [], not self.content.append_bos
        for sequence in self._long_sequences(text):
            length = 0
            for ids in encode_pieces(self.encoder, sequence):
                check_ids(ids, self.special.vocab_size)
                if len(ids) and not begun:
                    ids, begun = np.concatenate([[self.special.bos], ids]), True
                write(ids)
                length += len(ids)
            lengths += [length] if length else []
            if length >= MOST_TOKENS:
                raise BadDocument("too large", f"a sequence of {length} tokens, which no index can hold")
        if lengths and self.content.append_eod:
            write(np.array([self.special.eod]))
            lengths[-1] += 1
        return lengths

    def _long_sequences(self, text: Text) -> Iterator[Iterable[str]]:
        """Yield each sequence of the document in pieces. Sentences are split in the pieces that Megatron-LM makes."""
        if isinstance(text, list):
            return (slices(sentence) for sentence in text)
        if self.split is None:
            return iter((pieces(text),))
        return ([sentence] for piece in rejoined(pieces(text), CHARACTERS_AT_ONCE) for sentence in self.split(piece))
