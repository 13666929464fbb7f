"""Going back to a checkpoint from before the numbers went wrong, past the batches since: `rollbacks.json` of the run.

It is written before the first step that follows from it, so that a run that is killed then goes on as it would have.
"""

import json
import os
from pathlib import Path
from typing import Any

from configs.errors import CheckpointError, DivergedError
from configs.schema import Resume
from parallel import checkpoint
from parallel.comm import together

FILE = "rollbacks.json"


def read(run: Path) -> list[dict[str, Any]]:
    """In order: `step` that was reached, `to` which it went back, `batches` first and last, `why`."""
    path = run / FILE
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as e:
        raise CheckpointError("run", path, f"not readable ({e})", "restore it: it says which batches go unread") from e


def write(run: Path, entries: list[dict[str, Any]]) -> None:
    """Whole or not at all. Raises CheckpointError."""
    temporary = run / f"{FILE}.tmp"
    try:
        with open(temporary, "w") as f:
            json.dump(entries, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, run / FILE)
    except OSError as e:
        raise CheckpointError("run", run / FILE, f"cannot be written ({e})", "make room on the disk, and go on") from e


def go_back(run: Any, seen: dict[str, float]) -> None:
    """Go on, with the loop's `run`, from the newest checkpoint before the updates that were left out in a row.

    Raises DivergedError where the guard does not allow that, or there is none; `seen` is what the last step showed.
    """
    if not run.guard.goes_back(len(run.rollbacks)):
        raise _diverged(run, seen)
    run.saver.wait()
    folder, step, batch, why = Path(run.cfg.run.dir), run.step, run.loader.batch, run.guard.why
    first = step - run.guard.in_a_row + 1
    try:
        found = checkpoint.find(folder, run.mesh, Resume.must, run.identity(), before=first)
    except CheckpointError as e:
        raise _diverged(run, seen) from e
    run.restore(*found)
    run.loader.skip.append((run.loader.batch + 1, batch))
    run.rollbacks.append({"step": step, "to": run.step, "batches": run.loader.skip[-1], "why": why})
    together(lambda: write(folder, run.rollbacks) if run.mesh.rank == 0 else None, run.mesh)
    if run.log:
        run.log.rolled_back(run.tokens, run.rollbacks)
    run.meter.restart()
    run.meter.pause()


def _diverged(run: Any, seen: dict[str, float]) -> DivergedError:
    """What ends the run, with all there is to see written down."""
    look = Path(run.cfg.run.dir, "diverged", f"step-{run.step:08d}.json")
    if run.log:
        end = run.loader.consumed
        rows = {"first": end - run.cfg.train.global_batch, "end": end}
        position = {"step": run.step, "batch": run.loader.batch, "rows": rows, "data": run.loader.state_dict()}
        numbers = {**seen, "guard": run.guard.state_dict(), "parameters": run.engine.norms}
        run.log.bundle(look, {**position, "why": run.guard.why, **numbers})
    why = f"{run.guard.in_a_row} updates left out in a row, {run.guard.skipped} in all; now {run.guard.why}"
    why += f" (loss {seen['loss']}, gradient norm {seen['norm']})"
    fix = f"see {look}, then continue from a checkpoint before it with a lower optim.lr"
    return DivergedError("step", run.step, why, fix)
