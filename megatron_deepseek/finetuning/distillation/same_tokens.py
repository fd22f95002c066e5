"""The vocabularies of teacher and student compared: probabilities of other tokens mean nothing to a student.

The entries of both tokenizers are compared, not their files: one that a release wrote anew has the same ids. The
embeddings may have more rows than the tokenizer has ids, and different numbers of them: rows behind the smaller one's
end are padding, and count for nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import xxhash

from megatron_deepseek.checkpoint.convert.assets import DIRECTORY
from megatron_deepseek.checkpoint.convert.tokenizer_files import JSON, tokenizer_to_keep
from megatron_deepseek.settings import DataSettings

_ADVICE = "probabilities of other tokens cannot be compared; train on the teacher's answers instead"


def run_entries(data: DataSettings) -> dict[str, int] | None:
    """Return the ids of all tokens of a run's tokenizer, None for one without tokens (NullTokenizer)."""
    files, _ = tokenizer_to_keep(data.tokenizer_type, data.tokenizer_model)
    return _entries(files[JSON]) if JSON in files else None


def teacher_entries(root: Path) -> dict[str, int] | None:
    """Return the ids of all tokens of the tokenizer that is with a teacher's weights, None if there is none."""
    found = next((each for each in (root / JSON, root / DIRECTORY / JSON) if each.is_file()), None)
    return None if found is None else _entries(found.read_bytes())


def _entries(file: bytes) -> dict[str, int]:
    from tokenizers import Tokenizer
    return Tokenizer.from_buffer(file).get_vocab()


def entries_digest(entries: Mapping[str, int] | None, vocab_size: int) -> str:
    """Return a hash of a vocabulary; of one without entries that of its size."""
    decided = vocab_size if entries is None else sorted(entries.items(), key=lambda each: each[::-1])
    return xxhash.xxh3_128_hexdigest(json.dumps(decided).encode())


def refuse_other_vocabulary(teacher: Path, data: DataSettings, teacher_size: int, student_size: int) -> None:
    """Raise ValueError if the teacher's ids are other tokens than the student's. Rows of embeddings are `..._size`."""
    theirs, ours = teacher_entries(teacher), run_entries(data)
    if theirs is not None and ours is not None:
        difference = first_difference(theirs, ours)
        if difference is not None:
            raise ValueError(f"--teacher {teacher} has another tokenizer than {_named(data)}: {difference}; {_ADVICE}")
    elif teacher_size != student_size:
        raise ValueError(f"--teacher {teacher} has a vocabulary of {teacher_size} ids, the student of {student_size}, "
                         f"and no tokenizer says that they are the same tokens; {_ADVICE}")


def first_difference(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str | None:
    """Return in words the lowest id that is another token, None if there is none."""
    if theirs == ours:
        return None
    there, here = ({number: token for token, number in entries.items()} for entries in (theirs, ours))
    different = (number for number in there.keys() | here.keys() if there.get(number) != here.get(number))
    first = min(different, default=None)
    if first is None:  # a token with two ids, or two tokens with one
        return f"{len(theirs):,} tokens there, {len(ours):,} here"
    return (f"id {first} is {_shown(there, first)} there and {_shown(here, first)} here ({len(theirs):,} and "
            f"{len(ours):,} tokens)")


def _shown(tokens: Mapping[int, str], number: int) -> str:
    return repr(tokens[number]) if number in tokens else "no token"


def _named(data: DataSettings) -> str:
    return f"--tokenizer-model {data.tokenizer_model}" if data.tokenizer_model else f"the {data.tokenizer_type}"
