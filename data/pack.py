"""Rows of a fixed length from pieces of token streams: what is in a row depends on its pieces alone."""

import numpy as np

from data.shards import Shard

IGNORE = -100  # label of a token after which nothing is predicted


def fill(tokens: np.ndarray, labels: np.ndarray, pieces: list[tuple[Shard, int, int]], end_of_text: int) -> list[int]:
    """Write pieces (shard, begin, end) one after the other into a row; returns where documents start in it.

    tokens, labels [s] int32: a label is the next token of the same document, or IGNORE. Each piece starts a document in
    the row, and what they leave empty is one of end-of-text. Raises DataError for a damaged sample.
    """
    place, out = 0, []
    for shard, begin, end in pieces:
        count = end - begin
        data = shard.tokens(begin, min(end + 1, len(shard)))
        tokens[place : place + count] = data[:count]
        labels[place : place + len(data) - 1] = data[1:]
        if len(data) == count:  # the shard ends here
            labels[place + count - 1] = IGNORE
        starts = shard.starts_within(begin, end) + (place - begin)
        labels[starts - 1] = IGNORE  # of the last token of a document
        out.append(place)
        out += starts.tolist()
        place += count
        if len(starts) and starts[-1] == place:  # begins after this piece
            out.pop()
    if place < len(tokens):
        tokens[place:], labels[place:] = end_of_text, IGNORE
        out.append(place)
    return out
