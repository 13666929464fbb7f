"""Requests to end a run at its next step boundary."""

import signal
from pathlib import Path
from types import FrameType
from typing import Optional

from configs.errors import PREEMPTED

REASONS = {  # exit code and reason
    "preempted": (PREEMPTED, "asked to stop by SIGTERM or SIGUSR1"),
    "out of time": (PREEMPTED, "the end of run.time_limit or of the slurm job is near"),
    "interrupted": (0, "stopped by the user"),
}


class Stop:
    """Listens for SIGTERM and SIGUSR1 (preempted: run again later), SIGINT and a STOP file (the user is done)."""

    def __init__(self) -> None:
        self.signals: set[int] = set()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def asked(self, run: Path) -> Optional[str]:
        """A key of REASONS if this process was told to stop, or `run` holds a file STOP."""
        if self.signals & {signal.SIGTERM, signal.SIGUSR1}:
            return "preempted"
        return "interrupted" if self.signals or (run / "STOP").exists() else None

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        if number == signal.SIGINT and number in self.signals:
            raise KeyboardInterrupt  # asked twice: at once
        self.signals.add(number)
