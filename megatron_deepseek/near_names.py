"""Known names that are spelt like an unknown one, for messages: did you mean ...?"""

import difflib
from collections.abc import Iterable


def near_names(name: str, known: Iterable[str], cutoff: float = 0.75, most: int = 3) -> list[str]:
    """Return at most `most` of `known`, the likeliest first, whose similarity to `name` is at least `cutoff`.

    The similarity is difflib's ratio: 0.9 for a word of ten letters with one wrong letter; at 0.75 half of the
    proposals are of no use.
    """
    return difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
