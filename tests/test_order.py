"""The arithmetic of the order: permutations, mixtures, and windows that are left half read."""

import numpy as np
import pytest

from data.order import ROUND, Mixture, Rows, permute, shares


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_permutation(size):
    images = permute(np.arange(size), size, 12345)
    assert sorted(images.tolist()) == list(range(size))
    if size > 6:
        assert images.tolist() != permute(np.arange(size), size, 54321).tolist()


def test_permute_does_each_element_for_itself():
    sizes, keys = np.array([5, 700, 10**12, 1]), np.array([1, 2, 3, 4], np.uint64)
    together = permute(np.array([4, 699, 10**11, 0]), sizes, keys).tolist()
    alone = [int(permute(np.array([i]), s, int(k))[0]) for i, s, k in zip((4, 699, 10**11, 0), sizes.tolist(), keys)]
    assert together == alone


def test_a_permutation_looks_like_chance():
    moved = permute(np.arange(10**5), 10**5, 7)
    assert abs(np.corrcoef(np.arange(10**5), moved)[0, 1]) < 0.02
    assert abs((np.diff(moved) == 1).sum() - 1) < 8, "neighbours stay neighbours no more often than by chance"


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([1.0], [1]), ([0.7, 0.3], [7, 3]), ([2, 1, 1], [2, 1, 1]), ([0.1, 0.2, 0.3], [1, 2, 3]), ([1e3, 500], [2, 1])],
)
def test_weights_are_whole_shares(weights, counts):
    assert shares(weights) == counts


def test_fine_weights_are_rounded_and_none_is_lost():
    counts = shares([123456.789, 98765.4321, 0.001])
    assert sum(counts) in (ROUND, ROUND + 1)
    assert min(counts) == 1
    assert counts[0] / sum(counts) == pytest.approx(123456.789 / 222222.2221, abs=1 / ROUND)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.5, 0.25, 0.25], [0.9, 0.05, 0.03, 0.02], [1 / 3, 2 / 3], [5]])
def test_a_mixture_keeps_its_weights_at_every_slot(weights):
    mixture = Mixture(weights)
    share = mixture.counts / mixture.counts.sum()
    assert share == pytest.approx(np.array(weights) / sum(weights), abs=1 / ROUND)
    slots = np.arange(3 * len(mixture.round) if len(mixture.round) < 5000 else 70_000)
    source, index = mixture.locate(slots)
    seen = np.zeros(len(weights), np.int64)
    for k in slots[:5000].tolist():
        assert mixture.taken(k) == seen.tolist()
        assert index[k] == seen[source[k]]
        seen[source[k]] += 1
        assert np.abs(seen - share * (k + 1)).max() < 1 + 1e-9
    far = 10**15 + 3
    assert int(mixture.locate(np.array([far]))[1][0]) in mixture.taken(far)


SIZES = np.array([50, 7, 0, 123, 64, 1, 99, 300, 20, 20, 41, 8, 77, 5, 13, 60, 900, 31, 2])


def read(rows: Rows, start: int, stop: int) -> list[tuple[int, int]]:
    """Every (shard, token) of positions [start, stop)."""
    out = []
    for epoch, window, row in zip(*(x.tolist() for x in rows.locate(np.arange(start, stop)))):
        for shard, begin, end in rows.window(epoch, window).pieces(row * rows.step, (row + 1) * rows.step):
            out += [(shard, t) for t in range(begin, end)]
    return out


EVERYTHING = sorted((s, t) for s, n in enumerate(SIZES.tolist()) for t in range(n))


@pytest.mark.parametrize("step", [1, 8, 31, 500])
def test_an_epoch_is_everything_once_and_the_next_is_another_order(step):
    rows = Rows(SIZES, step, 5)
    first, second = (read(rows, e * rows.total, (e + 1) * rows.total) for e in range(2))
    assert sorted(first) == sorted(second) == EVERYTHING
    assert first != second
    assert rows.total * step < SIZES.sum() + len(rows.rows) * step, "less than a row a window is padding"


@pytest.mark.parametrize("steps", [(8, 32), (32, 8), (8, 31, 7), (16, 64, 16, 100), (5, 5)], ids=str)
@pytest.mark.parametrize("taken", [0, 1, 3, 9, 12])
def test_rows_of_another_length_take_up_what_was_not_read(steps, taken):
    """Through any changes of length, in one window or not, an epoch is everything once."""
    seen, rest = [], None
    for step in steps[:-1]:
        rows = Rows(SIZES, step, 5, rest)
        seen += read(rows, 0, taken)
        rest = rows.unread(taken, lambda window, row, step=step: [(row * step, (row + 1) * step)])
    rows, position = Rows(SIZES, steps[-1], 5, rest), 0
    while len(seen) < len(EVERYTHING):
        seen += read(rows, position, position + 1)
        position += 1
    assert sorted(seen) == EVERYTHING
    assert sorted(read(rows, position, position + rows.total)) == EVERYTHING, "and so is the next"


def test_what_follows_a_window():
    rows = Rows(SIZES, 8, 5)
    epochs, windows, _ = (x.tolist() for x in rows.locate(np.arange(2 * rows.total)))
    names = list(zip(epochs, windows))
    for i in range(rows.total):
        j = next(j for j in range(i, len(names)) if names[j] != names[i])
        assert rows.next_window(i) == names[j]
