"""Parts of a step: each moment counts once, for the innermost part, and only in a watched step."""

import time

import pytest
import torch

from parallel.stopwatch import Stopwatch


def work(watch: Stopwatch) -> None:
    with watch.part("backward"):
        time.sleep(0.04)
        watch.timed("reduce", time.sleep)(0.08)
        time.sleep(0.02)
    time.sleep(0.03)


def test_inner_parts_are_not_counted_twice():
    watch = Stopwatch(torch.device("cpu"))
    watch.watch()
    begin = time.perf_counter()
    work(watch)
    work(watch)
    parts = watch.read()
    whole = time.perf_counter() - begin
    assert parts["time/reduce_s"] >= 0.16
    assert 0.12 <= parts["time/backward_s"] < parts["time/reduce_s"]
    assert 0.06 <= parts["time/other_s"] < parts["time/backward_s"]
    assert sum(parts.values()) == pytest.approx(whole, abs=0.01)


def test_a_step_that_is_not_watched_costs_no_marks():
    watch = Stopwatch(torch.device("cpu"))
    work(watch)
    assert watch.marks == []
    assert watch.read() == {}
    watch.watch()
    assert watch.read()
    assert watch.read() == {}, "read once"


@pytest.mark.gpu
def test_the_device_is_not_waited_for():
    x = torch.randn(8192, 8192, device="cuda")
    watch = Stopwatch(x.device)
    watch.watch()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with watch.part("forward"):
        for _ in range(20):
            x = x @ x
            x /= x.norm()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    whole = time.perf_counter() - begin
    assert host < whole / 2
    assert watch.read()["time/forward_s"] == pytest.approx(whole, rel=0.2)
