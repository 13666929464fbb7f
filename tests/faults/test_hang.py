"""F26: one of two ranks hangs. The run ends in time, says which and where, and starts again; it loses a few steps."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch import hang
from launch.clock import Clock
from tests.faults.faulty import SAVES, faulty, same

TIMEOUT = 4


def test_a_stopped_rank_is_named_and_ended(corpus, tmp_path, unbroken_by_two):
    said = hangs(corpus, tmp_path, unbroken_by_two, "stop")
    assert "does not answer" in said


@pytest.mark.slow
def test_an_endless_loop_is_named_with_its_place(corpus, tmp_path, unbroken_by_two):
    said = hangs(corpus, tmp_path, unbroken_by_two, "loop")
    assert re.search(r"in step 5 \(step\) at tests/faults/inject.py:\d+ in _loop", said)
    stacks = (tmp_path / "run/hang/step-00000005/rank-00001.txt").read_text()
    assert re.search(r'inject.py", line \d+ in _loop', stacks)


@pytest.mark.slow
def test_a_loader_that_sleeps_is_named_with_its_place(corpus, tmp_path, unbroken_by_two):
    said = hangs(corpus, tmp_path, unbroken_by_two, "loader")
    assert re.search(r"at tests/faults/inject.py:\d+ in <lambda>", said)


@pytest.mark.slow
def test_a_rank_that_holds_the_interpreter_is_named_and_its_stack_printed(corpus, tmp_path, unbroken_by_two):
    said = hangs(corpus, tmp_path, unbroken_by_two, "interpreter")
    assert "does not answer" in said
    assert re.search(r'inject.py", line \d+ in <lambda>', said)


def hangs(corpus: str, place: Path, unbroken: Path, kind: str) -> str:
    """All that the run says when rank 1 does this in its fifth step."""
    process = faulty(corpus, place, f"{kind}:1:5", *SAVES, f"parallel.timeout={TIMEOUT}")
    seen = [(time.monotonic(), line) for line in process.stdout]
    assert process.wait(60) == 0
    begun = next(t for t, line in seen if line.startswith("step      4/"))
    ended = next(t for t, line in seen if line.startswith("supervisor: "))
    assert ended - begun < TIMEOUT + 15
    same(place / "run", unbroken)
    (error,) = [line for _, line in seen if line.startswith("error: ")]
    assert "hangs: rank 1 (host " in error
    assert "rank 0" not in error
    return "".join(line for _, line in seen)


@pytest.mark.gpu
def test_a_device_with_work_left_waits():
    device = torch.device("cuda")
    torch.cuda.synchronize()
    assert not hang.unfinished(device)
    torch.cuda._sleep(2**31)  # a second or so
    assert hang.unfinished(device)
    torch.cuda.synchronize()
    assert not hang.unfinished(device)


def test_who_is_named():
    busy, waits = {"step": 7, "waits": False}, {"step": 7, "waits": True}
    assert hang.suspects({0: waits, 2: busy}, 3) == [1], "who is silent, before who is busy"
    assert hang.suspects({0: waits, 1: busy, 2: waits}, 3) == [1]
    assert hang.suspects({0: waits, 1: {"step": 6, "waits": True}}, 2) == [1], "who is behind"
    assert hang.suspects({0: waits, 1: waits}, 2) == [0, 1]


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """A clock and its watchdog, of a process alone, which looks often and does not end the process."""
    monkeypatch.setattr(hang, "PERIOD", 0.02)
    monkeypatch.setattr(hang.Watchdog, "_give_up", lambda self: self.done.set())
    clock = Clock()
    watchdog = hang.Watchdog(clock, SimpleNamespace(rank=0, world=1, device=torch.device("cpu")), tmp_path, timeout=0.2)
    yield clock, watchdog.done
    watchdog.stop()


@pytest.mark.parametrize("phase", ["start", "first step", "evaluate", "save"])
def test_what_is_no_step_may_take_longer(watched, phase):
    clock, gave_up = watched
    if phase != "start":
        clock.enter(phase, 1)
    time.sleep(0.6)
    assert not gave_up.is_set()
    clock.alive()
    assert gave_up.wait(60), "ten times as long, and not for ever"


def test_a_step_may_not(watched):
    clock, gave_up = watched
    for step in range(20):
        clock.enter("step", step)
        time.sleep(0.05)
    assert not gave_up.is_set(), "each step counts anew"
    assert gave_up.wait(60)
