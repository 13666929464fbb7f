"""Runs with faults in them, and the one without that they have to equal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.test_train import ROOT, SMALL, lines

SAVES = ["train.steps=6", "checkpoint.every=2"]


def faulty(corpus: str, place: Path, faults: str, *overrides: str, processes: int = 2) -> subprocess.Popen:
    """Start `place`/run under a supervisor, with the faults of tests/faults/inject.py; what it says is one stream."""
    once = place / "once"
    once.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env |= {"SPARSETRON_TRAIN": str(ROOT / "tests/faults/inject.py"), "FAULTS": faults, "ONCE": str(once)}
    options = [*SMALL, f"data.path={corpus}", f"run.dir={place / 'run'}", *overrides]
    start = [str(ROOT / "launch/local.sh"), "-n", str(processes), *options]
    return subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def ranks(supervisor: subprocess.Popen) -> list[int]:
    """Process ids of the ranks below torchrun, in their order."""
    (torchrun,) = psutil.Process(supervisor.pid).children()
    found = {p.environ()["RANK"]: p.pid for p in torchrun.children()}
    return [found[rank] for rank in sorted(found)]


def newest(run: Path) -> int:
    """Step of the newest published checkpoint; 0 without one."""
    return max((int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*[0-9]")), default=0)


def same(run: Path, other: Path) -> None:
    """Losses, norms and rates of all steps, and the last checkpoint's files, are the same to the bit."""
    for step, m in lines(other).items():
        for key in ("loss", "grad_norm", "lr", "tokens"):
            assert lines(run)[step][key] == m[key], (step, key)
    last = max(p.name for p in (other / "checkpoints").iterdir())
    hashes = [json.loads((r / "checkpoints" / last / "MANIFEST.json").read_text())["files"] for r in (run, other)]
    assert hashes[0] == hashes[1]
    assert not list((run / "checkpoints").glob("*.tmp"))
