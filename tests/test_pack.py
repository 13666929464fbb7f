"""Rows against a plain list of documents."""

import numpy as np
import pytest

from configs.schema import LongDocuments
from data.pack import IGNORE, make_row, row_starts
from data.shards import Shard, write_shard

END = 99


def shard(tmp_path, lengths: list[int]) -> tuple[Shard, list[list[int]]]:
    """A shard of documents whose tokens are all different, each closed by END."""
    first, documents = 100, []
    for n in lengths:
        documents.append([*range(first, first + n - 1), END])
        first += n
    entry = write_shard(tmp_path / "s.tar", [np.array(d) for d in documents], "uint16")
    return Shard(tmp_path, entry, "uint16", verify=True), documents


def rows_of(made: Shard, seq_len: int, how: LongDocuments) -> list:
    return [make_row(made, int(s), seq_len, END) for s in row_starts(made, seq_len, how)]


def check_row(row, seq_len: int) -> None:
    assert len(row.tokens) == len(row.labels) == seq_len
    assert row.starts[0] == 0
    assert (np.diff(row.starts) > 0).all()
    assert row.starts[-1] < seq_len


@pytest.mark.parametrize("seq_len", [1, 4, 5, 7, 16, 100])
@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [16], [17], [3, 12, 1, 9, 40, 2], [8, 8, 8, 8]], ids=str)
def test_carry_keeps_every_token_once(tmp_path, lengths, seq_len):
    made, documents = shard(tmp_path, lengths)
    stream = [t for d in documents for t in d]
    after = [b for d in documents for b in [*d[1:], IGNORE]]  # the next token of the same document
    starts = np.cumsum([0, *lengths[:-1]])
    rows = rows_of(made, seq_len, LongDocuments.carry)
    for i, row in enumerate(rows):
        check_row(row, seq_len)
        part = slice(i * seq_len, (i + 1) * seq_len)
        padding = seq_len - len(stream[part])
        assert row.tokens.tolist() == stream[part] + [END] * padding
        assert row.labels.tolist() == after[part] + [IGNORE] * padding
        inside = {0} | {int(s) - part.start for s in starts if part.start <= s < min(part.stop, len(stream))}
        assert set(row.starts.tolist()) == inside | ({seq_len - padding} if padding else set())
    assert len(rows) == -(-len(stream) // seq_len)


@pytest.mark.parametrize("seq_len", [4, 7, 16])
def test_cut_begins_each_row_with_a_document(tmp_path, seq_len):
    made, documents = shard(tmp_path, [3, 12, 1, 9, 40, 2])
    firsts = [d[0] for d in documents]
    seen = []
    for row in rows_of(made, seq_len, LongDocuments.cut):
        check_row(row, seq_len)
        assert row.tokens[0] in firsts
        seen += row.tokens.tolist()
    assert len(seen) == len(rows_of(made, seq_len, LongDocuments.cut)) * seq_len
    kept = [t for t in seen if t != END]
    assert len(kept) == len(set(kept)), "no token twice"


def test_blocks_of_a_shard_are_one_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.BLOCK", 10)
    made, documents = shard(tmp_path, [4, 7, 30, 1, 1, 9, 5])
    assert len(made.blocks) > 2
    stream = [t for d in documents for t in d]
    for s in range(0, len(stream), 3):
        for e in range(s, len(stream) + 1, 5):
            assert made.read(s, e).tolist() == stream[s:e]
