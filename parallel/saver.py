"""Saves: a copy of the engine's state in host memory, written, hashed and published behind the training that goes on.

A checkpoint is written into a fresh temporary folder, every file is synced and hashed, MANIFEST.json lists them with
the run's own state, and one rename publishes it. A published step is never written again.
"""

import copy
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, TypeVar

import torch.distributed as dist

from configs import schema
from configs.errors import CheckpointError, RunError
from configs.schema import OnSaveError
from parallel import pieces
from parallel.checkpoint import PIECES, VERSION, published, sealed, sha256
from parallel.comm import agree, host_gather, host_sum, together
from parallel.engine import Engine
from parallel.mesh import Mesh

T = TypeVar("T")
Figures = dict[str, Any]


class Saver:
    """Saves the steps of a run, one at a time. Collective to build, and in every method but `finished`.

    `report` is called on every rank with what each save took, or why it failed where `checkpoint.on_error=skip`.
    """

    def __init__(
        self, run: Path, engine: Engine, mesh: Mesh, options: schema.Checkpoint, report: Callable[[Figures], Any]
    ):
        """Raises CheckpointError on every rank if one of them cannot write into `run`."""
        self.root, self.engine, self.options, self.report = run / "checkpoints", engine, options, report
        self.mesh = mesh
        # Of the thread alone: on the groups of training its collectives would meet those of other ranks' steps.
        self.apart = replace(mesh, control=dist.new_group(backend="gloo"))
        self.asynchronous = options.asynchronous and options.every > 0
        _everyone(mesh, self.root, lambda: _probe(self.root, mesh.rank))
        self.memory = engine.host_memory() if self.asynchronous else None
        self.thread: Optional[threading.Thread] = None  # of the save in flight
        self.figures: Figures = {}  # of that save
        self.error: Optional[RunError] = None  # that it ended with, the same on every rank

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to publish `checkpoints/step-NNNNNNNN` with `state` (JSON: identity, layout, counters, data position).

        Waits for the save before it, then only for the copy, or if saves are synchronous until it is published.
        Raises CheckpointError as `wait`.
        """
        began = time.perf_counter()
        if self.thread and not self.finished and self.mesh.rank == 0:
            print(f"step {step} waits for the save of step {self.figures['step']}", flush=True)
        self.wait()
        final = self.root / f"step-{step:08d}"
        if agree(self.mesh, final.exists):
            return
        snapshot = self.engine.snapshot(self.memory)
        self.figures, self.error = {"step": step, "tokens": state["tokens"]}, None
        work = (final, snapshot, copy.deepcopy(state))
        self.thread = threading.Thread(target=self._publish, args=work, daemon=True)
        self.thread.start()
        self.figures["save_stall_s"] = time.perf_counter() - began
        if not self.asynchronous:
            self.wait()

    @property
    def finished(self) -> bool:
        """Whether this rank has done its part of the save in flight."""
        return self.thread is not None and not self.thread.is_alive()

    def wait(self, last: bool = False) -> None:
        """Until there is no save in flight.

        Raises CheckpointError, the same on every rank and with nothing published, if one rank could not write; where
        `checkpoint.on_error=skip`, only if that was the `last` save.
        """
        if self.thread is not None:
            began = time.perf_counter()
            self.settle()
            self.thread = None
            self.figures["save_stall_s"] += time.perf_counter() - began
            self.report({**self.figures, "save_failed": str(self.error)} if self.error else self.figures)
        error = self.error
        if error and (last or self.options.on_error is OnSaveError.stop):
            self.error = None
            raise error

    def settle(self) -> None:
        """Let the save in flight end, well or not."""
        if self.thread is not None:
            self.thread.join()

    def _publish(self, final: Path, snapshot: pieces.Snapshot, state: dict[str, Any]) -> None:
        """The work of the thread."""
        began, size = time.perf_counter(), 0
        try:
            size = self._write(final, snapshot, state)
        except RunError as e:
            self.error = e
        except Exception as e:  # of torch.distributed: another rank is gone
            why = f"rank {self.mesh.rank}: {type(e).__name__} {e}"
            self.error = CheckpointError("checkpoint", final, why, "see why that rank ended, and go on")
        self.figures |= {"save_background_s": time.perf_counter() - began, "save_gib": size / 2**30}

    def _write(self, final: Path, snapshot: pieces.Snapshot, state: dict[str, Any]) -> int:
        """Returns the bytes of all ranks' files."""
        mesh, temporary, first = self.apart, final.with_suffix(".tmp"), self.apart.rank == 0
        needed = host_sum([snapshot.bytes], mesh)[0]
        try:
            _everyone(mesh, final, lambda: _fresh(temporary, needed) if first else None)
            parts = host_gather(_everyone(mesh, final, lambda: _written(temporary, snapshot, mesh.rank)), mesh)
            files = {name: entry for part in parts for name, entry in part.items()}
            manifest = sealed({"version": VERSION, "step": state["step"], "files": files, "state": state})
            keep = self.options.keep
            _everyone(mesh, final, lambda: _publish(temporary, final, manifest, keep) if first else None)
        except CheckpointError:
            agree(mesh, lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise
        return sum(entry["bytes"] for entry in files.values())


def _everyone(mesh: Mesh, path: Path, work: Callable[[], T]) -> T:
    """Do the work on every rank; whatever goes wrong on one of them is everybody's CheckpointError."""

    def guarded() -> T:
        try:
            return work()
        except Exception as e:
            why = f"rank {mesh.rank}: {type(e).__name__} {e}{_free(path)}"
            fix = "make room on the disk or fix its permissions, and go on"
            raise CheckpointError("checkpoint", path, why, fix) from e

    return together(guarded, mesh)


def _probe(root: Path, rank: int) -> None:
    """Write a little, as a save will: a disk that is full or read only is known before the first step."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f".probe-{rank:05d}"
    try:
        with open(path, "wb") as f:
            f.write(bytes(4096))
            f.flush()
            os.fsync(f.fileno())
    finally:
        path.unlink(missing_ok=True)


def _fresh(temporary: Path, needed: int) -> None:
    """An empty folder on a disk with room for so many bytes; what an interrupted save left behind goes."""
    for stale in temporary.parent.glob("*.tmp"):
        shutil.rmtree(stale)
    if shutil.disk_usage(temporary.parent).free < needed:
        raise OSError(f"no room for {needed:,} bytes")
    temporary.mkdir(parents=True)


def _free(path: Path) -> str:
    try:
        return f" ({shutil.disk_usage(path.parent).free:,} bytes are free there)"
    except OSError:
        return ""


def _written(folder: Path, snapshot: pieces.Snapshot, rank: int) -> dict[str, dict[str, Any]]:
    """Write this rank's file, down to the disk; returns what the manifest says of it."""
    path = pieces.write(folder / PIECES, snapshot, rank)
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}}


def _publish(temporary: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    with open(temporary / "MANIFEST.json", "w") as f:
        json.dump(manifest, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    _sync_folder(temporary / PIECES)
    _sync_folder(temporary)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    for old in published(final.parent.parent)[keep:]:
        shutil.rmtree(old)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
