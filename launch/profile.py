"""A torch trace of the steps that profile.steps names."""

from pathlib import Path
from typing import Optional

import torch
from torch.profiler import ProfilerActivity, profile

from configs.schema import Config


class Trace:
    """Records from the first of those steps to the last one, or to the run's end, and writes this rank's file."""

    def __init__(self, cfg: Config, rank: int):
        self.first, self.last = cfg.profile.steps or (0, 0)
        self.path = Path(cfg.run.dir, "traces", f"steps-{self.first}-{self.last}-rank-{rank:05}.json")
        self.profiler: Optional[profile] = None

    def before(self, step: int) -> None:
        """`step` is about to start."""
        if step == self.first:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.profiler = profile(activities=activities, record_shapes=True, acc_events=True)
            self.profiler.start()

    def after(self, step: int, end: bool) -> None:
        """`step` is done; `end`: it was the run's last one."""
        if self.profiler and (end or step == self.last):
            self.profiler.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(self.path))
            self.profiler = None
