"""What the commands of this package share: how they end, and a progress bar."""

import sys
import time
from collections.abc import Callable

from configs.errors import PREEMPTED, exit_code

BAR = 30  # letters


def run(work: Callable[[], None]) -> int:
    """The exit code of `work`; what it raises is one line on stderr."""
    try:
        return exit_code(work)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return PREEMPTED
    except BrokenPipeError:  # of who reads our output, as head does
        sys.stderr.close()
        return 0


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere: how much is done, how fast, how long it will take."""

    def __init__(self, name: str, unit: str, total: float, done: float = 0):
        self.name, self.unit, self.total, self.first = name, unit, total, done
        self.bar = sys.stdout.isatty()
        self.start = self.shown = time.monotonic()

    def show(self, done: float, more: str = "") -> None:
        """Print it, if it is time."""
        if time.monotonic() - self.shown >= (0.2 if self.bar else 10):
            self._print(done, more, "\r" if self.bar else "\n")

    def end(self, done: float, more: str = "") -> None:
        """Print it for the last time."""
        self._print(done, more, "\n")

    def _print(self, done: float, more: str, end: str) -> None:
        self.shown = time.monotonic()
        rate = (done - self.first) / max(self.shown - self.start, 1e-9)
        share = min(1.0, done / self.total) if self.total else 1.0
        left = (self.total - done) / rate if rate > 0 else float("inf")
        bar = f"[{'#' * int(share * BAR):{BAR}}] " if self.bar else ""
        said = f"{bar}{share:6.1%}  {done:,.1f} of {self.total:,.1f} {self.unit}  {rate:,.2f} {self.unit}/s"
        print(f"{self.name} {said}  {_clock(left)} left{more}", end="\033[K" + end if self.bar else end, flush=True)


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
