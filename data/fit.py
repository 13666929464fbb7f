"""Documents into rows so that few are cut: best fit, longest first, into as many rows as the tokens need anyway.

So the number of rows is known without a look at the documents, and the order of rows does not depend on them.
"""

from bisect import bisect_left, insort

import numpy as np


class Plan:
    """The spans of tokens that each row consists of."""

    def __init__(self, starts: np.ndarray, total: int, size: int):
        """`starts` [documents] is where documents start among `total` tokens; a row has `size`.

        A document longer than a row fills rows of its own, and its end is treated as a document. What fits nowhere
        whole is cut to fill what room is left: all rows together have less than one of padding.
        """
        ends = np.append(starts[1:], total)
        whole = (ends - starts) // size  # rows that a document fills alone
        rest = ends - starts - whole * size
        order = np.argsort(-rest, kind="stable")[: np.count_nonzero(rest)]
        begins, lengths = (ends - rest)[order], rest[order]
        first = int(whole.sum())
        row_of, room = _fit(lengths.tolist(), size, -(-total // size) - first)
        rows, fits = np.array(row_of, np.int64), np.array(row_of, np.int64) >= 0
        cut = np.array(_cut(begins[~fits].tolist(), lengths[~fits].tolist(), room), np.int64).reshape(-1, 3).T
        alone = np.repeat(starts - size * (np.cumsum(whole) - whole), whole) + size * np.arange(first)
        rows = np.concatenate((np.arange(first), first + rows[fits], first + cut[0]))
        by_row = np.argsort(rows, kind="stable")
        self.starts = np.concatenate((alone, begins[fits], cut[1]))[by_row]
        self.ends = np.concatenate((alone + size, (begins + lengths)[fits], cut[2]))[by_row]
        self.bounds = np.searchsorted(rows[by_row], np.arange(-(-total // size) + 1))  # of each row's in these

    def spans(self, row: int) -> list[tuple[int, int]]:
        """The (start, end) of a row."""
        first, last = self.bounds[row : row + 2].tolist()
        return list(zip(self.starts[first:last].tolist(), self.ends[first:last].tolist()))


def _fit(lengths: list[int], size: int, count: int) -> tuple[list[int], dict[int, list[int]]]:
    """Each length into the one of `count` rows that it leaves the least room in, -1 where there is none; and the rows
    by the room that they have left.
    """
    rooms, rows = ([size], {size: list(range(count))}) if count else ([], {})
    out = []
    for length in lengths:
        place = bisect_left(rooms, length)
        if place == len(rooms):
            out.append(-1)
            continue
        room = rooms[place]
        row = rows[room].pop()
        if not rows[room]:
            del rooms[place], rows[room]
        out.append(row)
        left = room - length
        if left in rows:
            rows[left].append(row)
        elif left:
            insort(rooms, left)
            rows[left] = [row]
    return out, rows


def _cut(begins: list[int], lengths: list[int], rows: dict[int, list[int]]) -> list[tuple[int, int, int]]:
    """(row, start, end) of parts of what fits nowhere whole, into the largest rooms first."""
    rooms = [[room, row] for room in sorted(rows) for row in rows[room]]
    out = []
    for begin, length in zip(begins, lengths):
        while length:
            room, row = rooms.pop()
            part = min(room, length)
            out.append((row, begin, begin + part))
            begin, length = begin + part, length - part
            if part < room:
                rooms.append([room - part, row])
    return out
