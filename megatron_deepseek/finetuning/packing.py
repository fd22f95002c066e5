"""Samples to rows: best fit, each sample whole and in one row. A pure function of lengths, in numpy.

Best fit decreasing: the longest sample goes first, each into the row with the least room that takes it. It needs at
most 11/9 of the fewest rows possible, and one (Johnson 1973); with the lengths of chats it leaves under 1 % empty.
Rows with the same room are alike, and so are samples of the same length, so both are moved in bulk: ten million
samples take seconds, and 40 bytes each.
"""

import numpy as np


def pack(lengths: np.ndarray, room: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (samples in the order of rows, first sample of each row and the end).

    No length may be more than `room`. Which of the samples of one length share a row, and their order in it, is drawn
    from `seed`.
    """
    assert len(lengths) == 0 or 0 < lengths.min() and lengths.max() <= room
    drawn = np.random.default_rng((seed, len(lengths))).permutation(np.arange(len(lengths), dtype=np.uint32))
    key = (room - lengths[drawn]).astype(np.uint16 if room < 1 << 16 else np.uint32)  # 16 bits are sorted by radix
    by_length = np.argsort(key, kind="stable").astype(np.uint32)
    del key
    rows = np.empty(len(lengths), np.uint32)
    rows[by_length] = _rows_of(np.bincount(lengths, minlength=room + 1), room)
    del by_length
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows))]) if len(rows) else np.zeros(1, np.int64)
    return drawn[np.argsort(rows, kind="stable")], starts


def _rows_of(counts: np.ndarray, room: int) -> np.ndarray:
    """Return the row of each sample, from the longest to the shortest; counts[n] samples have the length n."""
    open_rows: dict[int, list[np.ndarray]] = {}  # by the room that is left
    assigned, made, rooms = [], 0, np.zeros(room + 1, bool)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = np.flatnonzero(rooms[length:])
            if len(fitting):
                space = int(fitting[0]) + length
                taken = _take(open_rows, rooms, space, -(-left // (space // length)))
            else:
                space = room
                taken = np.arange(made, made - (-left // (room // length)), dtype=np.uint32)
                made += len(taken)
            filled = np.repeat(taken, space // length)[:left]
            assigned.append(filled)
            left -= len(filled)
            _give_back(open_rows, rooms, taken, space, length, len(filled))
    return np.concatenate(assigned) if assigned else np.empty(0, np.uint32)


def _take(open_rows: dict, rooms: np.ndarray, space: int, most: int) -> np.ndarray:
    """Return up to `most` of the rows with that much room, and close them."""
    there = np.concatenate(open_rows.pop(space))
    if len(there) > most:
        open_rows[space] = [there[most:]]
    else:
        rooms[space] = False
    return there[:most]


def _give_back(open_rows: dict, rooms: np.ndarray, taken: np.ndarray, space: int, length: int, samples: int):
    """Open the rows again with what room they have: all but the last took as many samples as they could."""
    each = space // length
    last = samples - each * (len(taken) - 1)
    for rows, left in ((taken[:-1], space - each * length), (taken[-1:], space - last * length)):
        if len(rows) and left:
            open_rows.setdefault(left, []).append(rows)
            rooms[left] = True
