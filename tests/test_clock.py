"""The accounts of a run's time, by arithmetic on a clock that the test sets."""

import json

import pytest

from configs.schema import duration
from launch import clock
from launch.clock import Clock, deadline


@pytest.fixture
def now(monkeypatch):
    """Of the machine: `now[0]` is time.monotonic(), which begins with the process at 0, `now[1]` is time.time()."""
    now = [0.0, 1e9]
    monkeypatch.setattr(clock, "process_start", lambda: 0.0)
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(clock.time, "time", lambda: now[1])
    return now


def work(c: Clock, now: list[float], *phases: tuple[str, float], left_out: bool = False) -> None:
    for i, (phase, seconds) in enumerate(phases):
        c.enter(phase, i)
        now[0] += seconds
        now[1] += seconds
        if left_out:
            c.left_out()


def test_goodput_is_the_share_of_time_in_steps(now, tmp_path):
    c = Clock()
    now[0], now[1] = 10.0, now[1] + 10.0  # the start took ten seconds
    c.begin(tmp_path)
    assert c.goodput() == 0
    work(c, now, ("step", 30.0))
    assert c.goodput() == pytest.approx(30 / 40), "the step under way is counted"
    work(c, now, ("evaluate", 5.0), ("save", 15.0), ("step", 20.0))
    assert c.goodput() == pytest.approx(50 / 80)
    work(c, now, ("step", 20.0), left_out=True)
    work(c, now, ("save", 0.0))
    assert c.goodput() == pytest.approx(50 / 100), "a step whose update is left out does not count"


def test_goodput_over_a_crash(now, tmp_path):
    first = Clock()
    first.begin(tmp_path)
    work(first, now, ("step", 40.0), ("save", 10.0))
    saved = json.loads(json.dumps(first.state_dict()))
    work(first, now, ("step", 30.0))  # lost: killed before the next save
    now[0], now[1] = 0.0, now[1] + 20.0  # the next process, on another machine even, 20 s later
    second = Clock()
    second.begin(tmp_path)
    second.load_state_dict(saved)
    assert second.goodput() == pytest.approx(40 / 100)
    work(second, now, ("step", 30.0), ("step", 30.0), ("save", 0.0))
    assert second.goodput() == pytest.approx(100 / 160)


def test_goodput_when_the_clock_was_set_back(now, tmp_path):
    first = Clock()
    first.begin(tmp_path)
    work(first, now, ("step", 50.0), ("save", 0.0))
    now[1] -= 86400
    second = Clock()
    second.begin(tmp_path)
    second.load_state_dict(first.state_dict())
    work(second, now, ("step", 50.0))
    assert 0 < second.goodput() <= 1


def test_it_asks_to_stop_while_there_is_time_for_a_step_and_a_save(now):
    c = Clock(deadline=200.0)
    work(c, now, ("step", 50.0), ("save", 10.0))
    c.enter("evaluate", 1)
    now[0] = 125.0
    assert c.asked() is None, "1.2 * (50 + 10) and the slack fit in"
    now[0] = 127.0
    assert c.asked() == "out of time"
    now[0] = 70.0
    work(c, now, ("step", 5.0), ("save", 10.0))
    c.enter("other", 2)
    now[0] = 167.0
    assert c.asked() is None, "now a step is known to take 5 s, as the first one had compiled, and an evaluation 10 s"
    now[0] = 169.0
    assert c.asked() == "out of time"
    assert Clock().asked() is None


def test_before_the_first_save_is_measured_time_is_kept_for_it(now):
    c = Clock(deadline=100.0)
    now[0] = 87.0
    assert c.asked() == "out of time", "a tenth of what there was, and slack"
    now[0] = 80.0
    assert c.asked() is None


def test_the_deadline_is_the_earlier_of_limit_and_job(now, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.delenv(clock.STARTED, raising=False)
    now[0] = 30.0
    assert deadline(None) is None
    assert deadline("1:00:00") == 3600, "of this process, which started at 0"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now[1]) + 1000))
    assert deadline("1:00:00") == 1030
    assert deadline(None) == 1030
    assert deadline("10:00") == 600
    monkeypatch.setenv(clock.STARTED, "-300.0")
    assert deadline("10:00") == 300, "of the supervisor"


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5", 1.5), ("2:30", 150), ("24:00:00", 86400)])
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "a", "1:", ":1", "1:2:3:4", "-5", "1h", "1e3"])
def test_no_durations(text):
    with pytest.raises(ValueError, match="no duration"):
        duration(text)
