"""Throughput of a run with the accounting that goes with it, and where it was measured."""

import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

import torch

from configs.schema import Config
from launch.baseline import Baseline
from launch.runs import PACKAGES
from parallel import metrics
from parallel.mesh import Mesh


class Meter:
    """Time, tokens and FLOPs of the steps between two log lines; evaluation and saving are not counted."""

    def __init__(self, cfg: Config, mesh: Mesh, baseline: Baseline):
        self.cfg, self.mesh, self.baseline = cfg, mesh, baseline
        self.peak = metrics.device_peak(device_name(mesh.device))

    def restart(self) -> None:
        """Begin a new interval now."""
        self.start, self.steps, self.flops, self.dense, self.waited = time.perf_counter(), 0, 0, 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank has nothing to do until the rows of all ranks are there."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def pause(self) -> None:
        """Something that is not training begins; `resume` ends it."""
        self.paused = time.perf_counter()

    def resume(self) -> None:
        """Training goes on."""
        self.start += time.perf_counter() - self.paused

    def count(self, flops: int, dense_flops: int) -> None:
        """Add a step and the work its global batch needs."""
        self.steps += 1
        self.flops += flops
        self.dense += dense_flops

    def read(self) -> dict[str, Any]:
        """The interval's figures (the device must be idle); begins the next."""
        seconds = time.perf_counter() - self.start
        tokens = self.steps * self.cfg.train.global_batch * self.cfg.data.seq_len
        speed = metrics.throughput(
            self.flops, self.dense, tokens, seconds, self.mesh.world, self.peak, self.baseline.tokens_per_s
        )
        out = {"step_s": seconds / self.steps, "data_wait_s": self.waited / self.steps}
        out |= {**speed, "speedup_from": self.baseline.source}
        out["mem_gib"] = metrics.memory_gib(self.mesh.device)
        self.restart()
        return out


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(mesh: Mesh, data_fingerprint: str) -> dict[str, Any]:
    """Where and with what a run was made."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": device_name(mesh.device),
        "world": mesh.world,
        **{package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": git.stdout.strip() or None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data_fingerprint": data_fingerprint,
    }


def _version(package: str) -> Optional[str]:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
