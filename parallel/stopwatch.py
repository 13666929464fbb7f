"""Where the time of a step goes on this rank: forward, backward, optimizer, communication where it stands apart."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

OTHER = "other"


class Stopwatch:
    """Marks the changes from one part of a watched step to another. On a GPU they are events in the device's own
    stream: nobody waits for them until they are read.
    """

    def __init__(self, device: torch.device):
        self.on_device = device.type == "cuda"
        self.watching = False
        self.part_now = OTHER
        self.marks: list[tuple[str, Any]] = []  # the part that begins, and when

    def watch(self) -> None:
        """The step that comes is to be measured, from now until `read`."""
        self.watching, self.marks = True, []
        self._mark(OTHER)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside is `name`; of a part inside another one the time counts once, for the inner one."""
        before, self.part_now = self.part_now, name
        self._mark(name)
        try:
            yield
        finally:
            self.part_now = before
            self._mark(before)

    def timed(self, name: str, work: Callable) -> Callable:
        """`work` as a part of that name."""

        @wraps(work)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return work(*args, **kwargs)

        return run

    def read(self) -> dict[str, float]:
        """Seconds of each part, time/NAME_s; nothing if the step was not watched. Waits for the device."""
        if not self.watching:
            return {}
        self._mark(OTHER)
        self.watching = False
        if self.on_device:
            self.marks[-1][1].synchronize()
        out: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self.marks, self.marks[1:]):
            key = f"time/{name}_s"
            out[key] = out.get(key, 0.0) + (begin.elapsed_time(end) / 1e3 if self.on_device else end - begin)
        return out

    def _mark(self, name: str) -> None:
        if not self.watching:
            return
        if self.on_device:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self.marks.append((name, event))
