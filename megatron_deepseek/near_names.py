"""Names that somebody may have meant who wrote another one."""

import difflib
from collections.abc import Iterable


def near_names(name: str, known: Iterable[str], cutoff: float = 0.75, most: int = 3) -> list[str]:
    """At most `most` of `known`, the likeliest first, whose similarity to `name` (difflib's ratio) is from `cutoff` up.

    Of a word of ten letters 0.9 is one wrong letter; at 0.75 half of the proposals are of no use.
    """
    return difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
