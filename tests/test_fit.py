"""Documents fitted into rows: everything once, and few are cut."""

import numpy as np
import pytest

from data.fit import Plan


def lay(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths[:-1]])


@pytest.mark.parametrize("size", [1, 2, 7, 50, 64, 4096])
@pytest.mark.parametrize("seed", range(6))
def test_every_token_is_in_one_row_and_no_row_has_more_than_its_size(size, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, (3, 40, 65, 300, 700, 10)[seed], 80).tolist()
    plan, total = Plan(lay(lengths), sum(lengths), size), sum(lengths)
    rows = [plan.spans(r) for r in range(-(-total // size))]
    assert sorted(t for row in rows for a, b in row for t in range(a, b)) == list(range(total))
    assert max(sum(b - a for a, b in row) for row in rows) <= size
    assert min(map(len, rows)) >= 1
    begins = set(lay(lengths).tolist())
    for a, b in (span for row in rows for span in row):
        assert not [s for s in begins if a < s < b], "a span is of one document"


def test_documents_that_fit_are_whole_and_longer_ones_are_cut_at_the_row():
    plan = Plan(lay([10, 3, 5, 2, 4]), 24, 4)
    rows = [plan.spans(r) for r in range(6)]
    assert rows[:4] == [[(0, 4)], [(4, 8)], [(13, 17)], [(20, 24)]]
    assert sorted(rows[4] + rows[5]) == [(8, 10), (10, 13), (17, 18), (18, 20)]


def test_what_fits_nowhere_whole_is_cut_to_fill_the_rest():
    plan = Plan(lay([3, 3, 3]), 9, 4)
    rows = [plan.spans(r) for r in range(3)]
    assert all(len(row) == 1 for row in rows), "there is room for each"
    plan = Plan(lay([3, 3, 3, 3]), 12, 4)
    rows = [plan.spans(r) for r in range(3)]
    assert [sum(b - a for a, b in row) for row in rows] == [4, 4, 4]
    assert sum(b - a == 3 for row in rows for a, b in row) == 3


def test_few_documents_are_cut():
    rng = np.random.default_rng(1)
    lengths = np.maximum(2, rng.lognormal(6.0, 1.05, 20_000)).astype(int).tolist()
    starts, size = lay(lengths), 4096
    plan = Plan(starts, sum(lengths), size)
    spans = set(zip(plan.starts.tolist(), plan.ends.tolist()))
    cut = sum(n <= size and (s, s + n) not in spans for s, n in zip(starts.tolist(), lengths))
    assert cut < 0.001 * len(lengths)
    split = sum(s // size != (s + n - 1) // size for s, n in zip(starts.tolist(), lengths))
    assert split > 0.1 * len(lengths), "one after the other, every sixth would be"
