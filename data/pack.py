"""Rows of a fixed length from the token stream of a shard: a function of the shard and the length alone."""

from dataclasses import dataclass

import numpy as np

from configs.schema import LongDocuments
from data.shards import Shard

IGNORE = -100  # label of a token after which nothing is predicted


@dataclass(frozen=True)
class Row:
    """seq_len tokens with their labels; documents start at `starts`, whose first is 0."""

    tokens: np.ndarray  # int64 [s]
    labels: np.ndarray  # int64 [s]: the next token of the same document, or IGNORE
    starts: np.ndarray  # int64 [documents]


def rows(tokens: int, seq_len: int) -> int:
    """Rows of a stream in which documents go on in the next row."""
    return -(-tokens // seq_len)


def row_starts(shard: Shard, seq_len: int, long_documents: LongDocuments) -> np.ndarray:
    """Where each row begins. With `cut` it is at a document: what did not fit into the row before is lost."""
    if long_documents is LongDocuments.carry:
        return np.arange(rows(len(shard), seq_len)) * seq_len
    out, start = [], 0
    while start < len(shard):
        out.append(start)
        after = int(np.searchsorted(shard.starts, start + seq_len))
        start = int(shard.starts[after]) if after < len(shard.starts) else len(shard)
    return np.array(out, np.int64)


def make_row(shard: Shard, start: int, seq_len: int, end_of_text: int) -> Row:
    """The row that begins at `start`. A short one, at the shard's end, is filled with a document of end-of-text."""
    stop = min(start + seq_len, len(shard))
    inside = shard.starts[np.searchsorted(shard.starts, start, "right") : np.searchsorted(shard.starts, stop)] - start
    tokens = np.full(seq_len, end_of_text, np.int64)
    labels = np.full(seq_len, IGNORE, np.int64)
    ahead = shard.read(start, min(stop + 1, len(shard)))
    tokens[: stop - start] = ahead[: stop - start]
    labels[: len(ahead) - 1] = ahead[1:]
    labels[inside - 1] = IGNORE  # the last token of a document that is followed by another in this row
    if stop in shard.starts[np.searchsorted(shard.starts, stop) :][:1]:  # and so is the row's last
        labels[stop - start - 1] = IGNORE
    padding = [stop - start] if stop - start < seq_len else []
    return Row(tokens, labels, np.concatenate(([0], inside, padding)).astype(np.int64))
