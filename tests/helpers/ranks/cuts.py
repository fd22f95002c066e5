"""Models cut into pipeline stages anywhere a layout string can: stages of the embedding or the head alone, MTP modules
spread over several, far more layers on one stage than on another.
"""

import random
from itertools import pairwise

MORE_LAYERS = 3
WITH_EMPTY = 100  # seeds


def random_cut(seed: int, num_stages: int, mtp: int) -> str:
    """The layout string of `num_stages` stages that is drawn from `seed`, with as many layers as it takes or some more.

    All cuts of a model of that many layers are as likely. From `WITH_EMPTY` on stages may be empty, too.
    """
    random_ = random.Random(f"{seed} {num_stages} {mtp}")
    fewest = max(1, num_stages - mtp - 2) if seed < WITH_EMPTY else 1
    parts = "E" + "t" * random_.randint(fewest, fewest + MORE_LAYERS) + "m" * mtp + "L"
    draw = random_.sample if seed < WITH_EMPTY else random_.choices
    ends = sorted(draw(range(1, len(parts)), k=num_stages - 1))
    return "|".join(parts[first:end] for first, end in pairwise([0, *ends, len(parts)]))
