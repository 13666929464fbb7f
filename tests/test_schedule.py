"""The learning rate at its corners."""

import pytest

from configs.schema import Optim
from parallel.schedule import learning_rate

CFG = Optim(lr=1e-3, min_lr=1e-4, warmup=10)


def test_corners():
    assert learning_rate(0, 100, CFG) == pytest.approx(1e-4)
    assert learning_rate(9, 100, CFG) == pytest.approx(1e-3)
    assert learning_rate(54, 100, CFG) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(99, 100, CFG) == pytest.approx(1e-4)


def test_rises_then_falls():
    rates = [learning_rate(s, 100, CFG) for s in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 10), (5, 5), (3, 0)])
def test_short_runs_have_positive_rates(steps, warmup):
    cfg = Optim(lr=1e-3, min_lr=1e-4, warmup=warmup)
    assert all(0 < learning_rate(s, steps, cfg) <= 1e-3 for s in range(steps))
