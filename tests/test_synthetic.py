"""Rows of random tokens: the same for any cut over ranks, and continued where they were left."""

import pytest
import torch

from configs.errors import DataError
from data.synthetic import RandomRows


def rows(dp_rank: int = 0, dp_size: int = 1, seed: int = 3) -> RandomRows:
    return RandomRows(100, 64, 8, 2, seed, dp_rank, dp_size)


def joined(loaders: list[RandomRows]) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [b for loader in loaders for b in loader.next_step()]
    return torch.cat([b.tokens for b in batches]), torch.cat([b.labels for b in batches])


def test_any_number_of_ranks_reads_the_same_batches():
    alone, four = [rows()], [rows(r, 4) for r in range(4)]
    for _ in range(2):
        for whole, parts in zip(joined(alone), joined(four)):
            assert torch.equal(whole, parts)


def test_a_row_is_one_document_and_each_token_has_a_label():
    batches = rows().next_step()
    assert len(batches) == 4
    for b in batches:
        assert b.cu_seqlens.tolist() == [0, 64, 128]
        assert torch.equal(b.tokens[:, 1:], b.labels[:, :-1])
        assert b.tokens.dtype == b.labels.dtype == torch.int32
        assert int(b.labels.min()) >= 0
        assert int(b.labels.max()) < 100
    tokens = torch.cat([b.tokens for b in batches])
    assert len(tokens.unique(dim=0)) == 8, "rows differ"
    assert len(tokens.unique()) == 100


def test_the_state_continues_and_other_data_are_refused():
    first, second = rows(), rows()
    first.next_step()
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(joined([first]), joined([second])))
    with pytest.raises(DataError, match="seed is 4"):
        rows(seed=4).load_state_dict(first.state_dict())
