"""Where the host waits for the GPU in steps that log nothing (profile.syncs=true): such a wait stops the host from
queueing work ahead. torch names waits inside operators; torch.cuda.synchronize() and collectives it does not see."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError
from configs.schema import Config

WARNING = "called a synchronizing CUDA operation"  # torch's words
OUTSIDE = (str(Path(torch.__file__).parent), warnings.__file__, __file__)


class Waits:
    """Counts them. Raises ConfigError where there is no GPU to wait for."""

    def __init__(self, cfg: Config, device: torch.device):
        self.on = cfg.profile.syncs
        if self.on and device.type != "cuda":
            why = "there is no GPU that the host could wait for"
            raise ConfigError("config", "profile.syncs=true", why, "leave it out, or run on a GPU")
        self.count = self.steps = 0  # since the last `read`
        self.known: dict[str, None] = {}  # lines that waited, each told once
        self.told = 0

    @contextmanager
    def watched(self, quiet: bool) -> Iterator[None]:
        """Count inside, if this is a `quiet` step, which has no reason to wait."""
        if not (self.on and quiet):
            yield
            return
        self.steps += 1
        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=WARNING)
            self.pass_on, warnings.showwarning = warnings.showwarning, self._seen
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def read(self) -> tuple[dict[str, float], list[str]]:
        """Waits a step since the last call, as a metric, and the lines that are new; nothing if no step was watched."""
        if not self.steps:
            return {}, []
        metric, new = {"syncs_per_step": self.count / self.steps}, list(self.known)[self.told :]
        self.count, self.steps, self.told = 0, 0, len(self.known)
        return metric, new

    def _seen(self, message: Any, *args: Any, **kwargs: Any) -> None:
        """Called by Python for a warning, on top of the stack that gave it."""
        if WARNING not in str(message):
            self.pass_on(message, *args, **kwargs)
            return
        self.count += 1
        self.known[_line()] = None


def _line() -> str:
    """The innermost line of the stack that is neither torch's nor of this file."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(OUTSIDE):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno} in {frame.f_code.co_name}"
