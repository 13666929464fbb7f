"""The order of rows: one sequence for any number of ranks, each row once an epoch, continued where it was left."""

import shutil

import pytest
import torch

from configs.errors import DataError
from configs.schema import LongDocuments
from data.loader import Batch, Loader, permute

S = 64


def loader(corpus, rank=0, size=1, **changes) -> Loader:
    options = dict(split="train", seq_len=S, global_batch=8, micro_batch=1, seed=3, dp_rank=rank, dp_size=size)
    return Loader(corpus, **{**options, **changes})


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row for b in batches for row in torch.cat((b.tokens, b.labels), dim=1).tolist()]


def documents(batches: list[Batch]) -> list[int]:
    """Document starts over all rows, whatever the micro-batches."""
    out, place = [], 0
    for b in batches:
        out += [place + s for s in b.cu_seqlens[:-1].tolist()]
        place += b.tokens.numel()
    return out


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_any_number_of_ranks_reads_the_same_global_batches(corpus, size):
    alone = loader(corpus)
    ranks = [loader(corpus, r, size) for r in range(size)]
    for _ in range(4):
        expected, parts = alone.next_step(), [b for r in ranks for b in r.next_step()]
        assert rows(parts) == rows(expected)
        assert documents(parts) == documents(expected)


@pytest.mark.parametrize("micro_batch", [2, 4, 8])
def test_micro_batches_are_the_same_rows(corpus, micro_batch):
    one, many = loader(corpus), loader(corpus, micro_batch=micro_batch)
    for _ in range(3):
        a, b = one.next_step(), many.next_step()
        assert [x.tokens.shape for x in b] == [(micro_batch, S)] * (8 // micro_batch)
        assert rows(a) == rows(b)
        assert documents(a) == documents(b)


@pytest.mark.parametrize("how", list(LongDocuments))
def test_each_row_once_an_epoch_in_another_order_each_time(corpus, how):
    made = loader(corpus, global_batch=1, long_documents=how)
    epochs = [[tuple(rows(made.next_step())[0]) for _ in range(made.total)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    places = {(i, j) for k in range(made.total) for i, j in [made._epoch.find(k)]}
    assert len(places) == made.total
    assert sorted(epochs[0]) != epochs[0]


@pytest.mark.parametrize("k", [0, 1, 7, 1000])
def test_continues_where_it_was_left(corpus, k):
    unbroken = loader(corpus)
    for _ in range(k):
        unbroken.next_step()
    continued = loader(corpus, 1, 2)
    continued.load_state_dict(unbroken.state_dict())
    assert rows(continued.next_step()) == rows(unbroken.next_step())[4:]
    assert continued.state_dict() == unbroken.state_dict()


def test_a_far_position_takes_no_longer(corpus):
    made = loader(corpus)
    made.load_state_dict({**made.state_dict(), "consumed_rows": 8 * 10**12})
    assert len(made.next_step()) == 8


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"seed": 4}, "seed"), ({"seq_len": 32}, "seq_len"), ({"long_documents": LongDocuments.cut}, "long_documents")],
    ids=str,
)
def test_another_order_is_refused(corpus, changes, word):
    with pytest.raises(DataError, match=word):
        loader(corpus, **changes).load_state_dict(loader(corpus).state_dict())


def test_other_data_is_refused(corpus, tmp_path):
    other = shutil.copytree(corpus, tmp_path / "other")
    text = (other / "manifest.json").read_text()
    (other / "manifest.json").write_text(text.replace('"name": "bpe:500"', '"name": "other"'))
    with pytest.raises(DataError, match="fingerprint"):
        loader(str(other)).load_state_dict(loader(corpus).state_dict())


def test_the_seed_decides_the_order(corpus):
    assert rows(loader(corpus).next_step()) == rows(loader(corpus).next_step())
    assert rows(loader(corpus, seed=4).next_step()) != rows(loader(corpus).next_step())


def test_labels_stay_in_their_document(corpus):
    made = loader(corpus)
    for _ in range(10):
        for b in made.next_step():
            ends = b.cu_seqlens[1:] - 1
            last = b.labels.flatten()[ends.long()]
            tokens, labels = b.tokens.flatten(), b.labels.flatten()
            inside = torch.ones(len(labels), dtype=torch.bool)
            inside[ends.long()] = False
            counted = inside & (labels >= 0)
            assert torch.equal(labels[counted], tokens.roll(-1)[counted])
            closed = tokens[ends.long()] == made.manifest.tokenizer["end"]
            assert (last[closed] == -100).all()
            assert int(b.cu_seqlens[-1]) == b.tokens.numel()


def test_held_out_rows_begin_anew(corpus):
    made = loader(corpus, split="val", global_batch=2)
    first = rows(made.next_step())
    made.next_step()
    made.reset()
    assert rows(made.next_step()) == first


def test_an_empty_split(corpus):
    with pytest.raises(DataError, match="the split test is empty"):
        loader(corpus, split="test")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_permute_is_a_permutation(size):
    images = [permute(i, size, "key") for i in range(size)]
    assert sorted(images) == list(range(size))
    if size > 6:
        assert images != [permute(i, size, "other") for i in range(size)]
