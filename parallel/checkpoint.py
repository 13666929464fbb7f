"""Checkpoints: the engine writes its pieces (parallel/pieces.py), this file decides when they count.

A checkpoint is written into a fresh temporary folder, every file is synced and hashed, MANIFEST.json lists them with
the run's own state, and one rename publishes it. A published step is never written again. Loading verifies every hash
before anything is read and falls back, loudly, to the one before.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, TypeVar

from configs.errors import CheckpointError
from configs.schema import Resume
from parallel.comm import host_gather, together
from parallel.engine import Engine
from parallel.mesh import Mesh

VERSION = 2
PIECES = "pieces"
T = TypeVar("T")


def save(run: Path, step: int, engine: Engine, mesh: Mesh, state: dict[str, Any], keep: int) -> Path:
    """Publish `run/checkpoints/step-NNNNNNNN` with `state` (JSON: identity, layout, counters, data position).

    Collective. Keeps the newest `keep`. Raises CheckpointError, on every rank and with nothing published, when a rank
    could not write.
    """
    root = run / "checkpoints"
    final, temporary = root / f"step-{step:08d}", root / f"step-{step:08d}.tmp"
    if _agree(mesh, final.exists):
        return final
    _write(mesh, final, lambda: _fresh(temporary) if mesh.rank == 0 else None)
    _write(mesh, final, lambda: engine.save(temporary / PIECES))
    parts = host_gather(_write(mesh, final, lambda: _hash_share(temporary, mesh)), mesh)
    files = {name: entry for part in parts for name, entry in part.items()}
    manifest = {"version": VERSION, "step": step, "files": files, "state": state}
    _write(mesh, final, lambda: _publish(temporary, final, manifest, keep) if mesh.rank == 0 else None)
    return final


def find(run: Path, mesh: Mesh, resume: Resume, state: dict[str, Any]) -> Optional[tuple[str, dict[str, Any]]]:
    """The newest checkpoint of `run` whose every file is whole, with its state; None for a new run. Collective.

    Raises CheckpointError when `resume` forbids what is there, or when the checkpoint's model is not the one that
    `state` says this run has. Its layout may be another one.
    """
    if resume is Resume.never:
        if _agree(mesh, lambda: run.exists() and any(run.iterdir())):
            raise CheckpointError("run.dir", run, "exists and resume=never", "choose another run.dir or resume=auto")
        return None
    for path in _agree(mesh, lambda: published(run)):
        problems = [p for p in host_gather(_damage(path, mesh.rank, mesh.world), mesh) if p]
        if problems:
            _say(mesh, f"warning: checkpoint {path}: {problems[0]}; going back to the one before")
            continue
        found = _agree(mesh, lambda path=path: json.loads(Path(path, "MANIFEST.json").read_text())["state"])
        _check_same(path, found, state)
        return path, found
    if resume is Resume.must:
        raise CheckpointError(
            "run.dir", run, "has no whole checkpoint and resume=must", "give resume=auto to start anew"
        )
    if _agree(mesh, lambda: bool(published(run))):
        raise CheckpointError("run.dir", run, "every checkpoint is damaged", "restore one, or choose another run.dir")
    return None


def load(path: str, engine: Engine) -> None:
    """Read the weights and the optimizer state from a checkpoint that `find` returned. Collective."""
    engine.load(Path(path, PIECES))


def newest(run: Path) -> tuple[str, dict[str, Any]]:
    """Path and state of the newest whole checkpoint, by one process alone. Raises CheckpointError if there is none."""
    for path in published(run):
        why = _damage(path)
        if why is None:
            return path, json.loads(Path(path, "MANIFEST.json").read_text())["state"]
        print(f"warning: checkpoint {path}: {why}; going back to the one before", file=sys.stderr, flush=True)
    raise CheckpointError("run", run, "has no whole checkpoint", "give a directory that train.py has made")


def begin(folder: Path, engine: Engine, mesh: Mesh, state: dict[str, Any]) -> None:
    """Read the weights of an exported model into an engine that has made no step. Collective.

    Raises CheckpointError if it is damaged, or of another model than `state` says this run has.
    """

    def look() -> None:
        try:
            content = json.loads((folder / "config.json").read_text())
            found = {f"{g}.{k}": v for g in ("model", "attention") for k, v in content[g].items()}
            whole = mesh.rank != 0 or sha256(folder / "model.safetensors") == content["sha256"]
        except (OSError, ValueError, KeyError, AttributeError) as e:
            why = f"not readable ({type(e).__name__} {e})"
            raise CheckpointError("model", folder, why, "give a directory that launch.export has made") from e
        if not whole:
            raise CheckpointError("model", folder, "model.safetensors does not match its hash", "export it again")
        _check_same(str(folder), {"identity": found}, state)

    together(look, mesh)
    engine.load(folder)


def group(identity: dict[str, Any], name: str) -> dict[str, Any]:
    """The options of one group in an identity, which has them by their whole names."""
    return {key.removeprefix(f"{name}."): v for key, v in identity.items() if key.startswith(f"{name}.")}


def published(run: Path) -> list[str]:
    """Paths of the published checkpoints, newest first."""
    paths = (run / "checkpoints").glob("step-*")
    return sorted((str(p) for p in paths if p.suffix != ".tmp"), reverse=True)


def _fresh(temporary: Path) -> None:
    """An empty folder; what an interrupted save left behind goes."""
    for stale in temporary.parent.glob("*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)


def _publish(temporary: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    with open(temporary / "MANIFEST.json", "w") as f:
        json.dump(manifest, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    _sync_folder(temporary)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    for old in published(final.parent.parent)[keep:]:
        shutil.rmtree(old)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _hash_share(folder: Path, mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Sync and hash every world-th file, so that the ranks divide the work."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file())[mesh.rank :: mesh.world]:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            out[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _digest(f)}
    return out


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return _digest(f)


def _digest(f: Any) -> str:
    digest = hashlib.sha256()
    while chunk := f.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _damage(path: str, rank: int = 0, world: int = 1) -> Optional[str]:
    """What a rank finds wrong with its share of a checkpoint, or None."""
    folder = Path(path)
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        if manifest["version"] != VERSION:
            return f"has format {manifest['version']}, this version reads {VERSION}"
        share = sorted(manifest["files"].items())[rank::world]
        for name, entry in share:
            if (folder / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {entry['bytes']}"
            if sha256(folder / name) != entry["sha256"]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{type(e).__name__} {e}"
    return None


def _check_same(path: str, found: dict[str, Any], state: dict[str, Any]) -> None:
    for key in sorted({**found["identity"], **state["identity"]}):
        there, here = found["identity"].get(key), state["identity"].get(key)
        if there != here:
            why = f"was made by another model: {key}={there}, this run has {here}"
            raise CheckpointError("checkpoint", path, why, f"give {key}={there}, or choose another")


def _agree(mesh: Mesh, ask: Callable[[], T]) -> T:
    """What rank 0 sees, on every rank: folders of a network file system may look different for a moment."""
    return host_gather(ask() if mesh.rank == 0 else None, mesh)[0]


def _write(mesh: Mesh, path: Path, work: Callable[[], T]) -> T:
    """Do the work on every rank; whatever goes wrong on one of them is everybody's CheckpointError."""

    def guarded() -> T:
        try:
            return work()
        except Exception as e:
            why = f"rank {mesh.rank}: {type(e).__name__} {e}"
            raise CheckpointError("checkpoint", path, why, "free the disk or fix its permissions, and go on") from e

    return together(guarded, mesh)


def _say(mesh: Mesh, line: str) -> None:
    if mesh.rank == 0:
        print(line, file=sys.stderr, flush=True)
