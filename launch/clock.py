"""What a rank does since when. Three things follow: when to end before a time limit, goodput, whether it hangs."""

import os
import time
from pathlib import Path
from typing import Any, Optional

import psutil

from configs.schema import duration

STARTED = "SPARSETRON_STARTED"  # time.monotonic() at which the supervisor of this process started
SLACK = 2.0  # seconds to leave in, beside what was measured
FIRST_SAVE = 60.0  # seconds a save is expected to take before one was measured


class Clock:
    """Told at each change of work. `step` is training, and the first one apart: it compiles."""

    def __init__(self, deadline: Optional[float] = None):
        """`deadline` is when the process has to be gone, by time.monotonic()."""
        self.deadline = deadline
        self.unmeasured_save = min(FIRST_SAVE, max(0.0, (deadline or 0) - time.monotonic()) / 10)
        self.phase, self.step, self.since = "start", 0, time.monotonic()
        self.changes = 0  # so that a watcher sees whether anything happens
        self.longest: dict[str, float] = {}  # seconds, by phase
        self.good = 0.0  # seconds in steps that count, in this process and those it continues
        self.first_start = self.born = _unix(process_start())

    def enter(self, phase: str, step: int) -> None:
        """Work of another kind begins."""
        took = self._elapsed()
        self.measured(self.phase, took)
        self.good += took if self._counts() else 0.0
        first = phase == "step" and not {"step", "first step"} & set(self.longest)
        self.phase, self.step, self.since = "first step" if first else phase, step, time.monotonic()
        self.changes += 1

    def measured(self, phase: str, seconds: float) -> None:
        """Work of this kind has taken so long, here or behind training."""
        self.longest[phase] = max(seconds, self.longest.get(phase, 0.0))

    def alive(self) -> None:
        """The work goes on: one of several like pieces is done."""
        self.changes += 1

    def left_out(self) -> None:
        """The step under way does not count."""
        self.phase = "left out"

    def asked(self) -> Optional[str]:
        """A key of REASONS (launch/stop.py) if another step, an evaluation and a save might end after the deadline."""
        step = self.longest.get("step", self.longest.get("first step", 0.0))
        save = self.longest.get("save", self.unmeasured_save)
        reserve = 1.2 * (step + self.longest.get("evaluate", 0.0) + save) + SLACK
        late = self.deadline is not None and time.monotonic() + reserve > self.deadline
        return "out of time" if late else None

    def goodput(self) -> float:
        """Share of the time since the run first started that went into steps that count."""
        good = self.good + (self._elapsed() if self._counts() else 0.0)
        here = time.monotonic() - process_start()
        before = max(0.0, self.born - self.first_start)  # clocks of two machines may differ
        return good / max(good, before + here)

    def begin(self, run: Path) -> None:
        """Look up when the run of this directory first started; the first process writes it down."""
        path = run / "started"
        if not path.exists():
            fresh = run / "started.tmp"
            fresh.write_text(repr(self.born))
            os.replace(fresh, path)
        self.first_start = float(path.read_text())

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: only what it has kept counts when it is continued."""
        return {"good": self.good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.good = state["good"]

    def _counts(self) -> bool:
        return self.phase in ("step", "first step")

    def _elapsed(self) -> float:
        return time.monotonic() - self.since


def deadline(limit: Optional[str]) -> Optional[float]:
    """The earlier of the end of the slurm job and `limit` after the start, of the supervisor if there is one.

    By time.monotonic(), which no correction of the clock moves. None without either.
    """
    ends = []
    if limit is not None:
        ends.append(float(os.environ.get(STARTED, process_start())) + duration(limit))
    if "SLURM_JOB_END_TIME" in os.environ:
        ends.append(time.monotonic() + float(os.environ["SLURM_JOB_END_TIME"]) - time.time())
    return min(ends, default=None)


def process_start() -> float:
    """When this process was started, by time.monotonic(): imports took a while."""
    return _START


def _unix(moment: float) -> float:
    return time.time() - time.monotonic() + moment


_START = time.monotonic() - (time.time() - psutil.Process().create_time())
