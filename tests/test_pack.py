"""Rows against a plain list of documents."""

import numpy as np
import pytest

from data.order import Window
from data.pack import IGNORE, fill
from data.shards import Shard, write_shard

END = 99


def shard(tmp_path, lengths: list[int], first: int = 100) -> tuple[Shard, list[list[int]]]:
    """A shard of documents whose tokens are all different, each closed by END."""
    documents = []
    for n in lengths:
        documents.append([*range(first, first + n - 1), END])
        first += n
    entry = write_shard(tmp_path / f"s{first}.tar", [np.array(d) for d in documents], "uint16")
    return Shard(tmp_path, entry, "uint16"), documents


def row(pieces, seq_len: int) -> tuple[list[int], list[int], list[int]]:
    tokens, labels = np.full(seq_len, -7, np.int32), np.full(seq_len, -7, np.int32)
    starts = fill(tokens, labels, pieces, END)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] < seq_len
    return tokens.tolist(), labels.tolist(), starts


@pytest.mark.parametrize("seq_len", [1, 4, 5, 7, 16, 100])
@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [16], [17], [3, 12, 1, 9, 40, 2], [8, 8, 8, 8]], ids=str)
def test_rows_of_a_window_are_its_shards_one_after_the_other(tmp_path, monkeypatch, lengths, seq_len):
    monkeypatch.setattr("data.shards.BLOCK", 10)
    made = [shard(tmp_path, lengths), shard(tmp_path, lengths[::-1], first=1000)]
    documents = [d for _, ds in made for d in ds]
    stream = [t for d in documents for t in d]
    after = [b for d in documents for b in [*d[1:], IGNORE]]  # the next token of the same document
    starts = set(np.cumsum([0, *map(len, documents)])[:-1].tolist())
    sizes = [len(s) for s, _ in made]
    window = Window((0, 0), [0, 1], [0, 0], np.cumsum(sizes).tolist())
    for i in range(-(-len(stream) // seq_len)):
        part = range(i * seq_len, (i + 1) * seq_len)
        pieces = [(made[k][0], b, e) for k, b, e in window.pieces(part.start, part.stop)]
        tokens, labels, found = row(pieces, seq_len)
        expected = stream[part.start : part.stop]
        padding = seq_len - len(expected)
        assert tokens == expected + [END] * padding
        assert labels == after[part.start : part.stop] + [IGNORE] * padding
        inside = {0} | {s - part.start for s in starts if s in part}
        assert set(found) == inside | ({seq_len - padding} if padding else set())


def test_a_row_without_pieces_is_empty():
    tokens, labels, starts = row([], 6)
    assert (tokens, labels, starts) == ([END] * 6, [IGNORE] * 6, [0])


def test_blocks_of_a_shard_are_one_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.BLOCK", 10)
    made, documents = shard(tmp_path, [4, 7, 30, 1, 1, 9, 5])
    assert made.entry.samples > 2
    stream = [t for d in documents for t in d]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    for s in range(0, len(stream), 3):
        for e in range(s, len(stream) + 1, 5):
            assert made.read(s, e).tolist() == stream[s:e]
            assert made.starts_within(s, e).tolist() == [x for x in starts.tolist() if s < x <= e]
    assert made.starts.tolist() == starts.tolist()
