"""F01, F03: killed without warning, in a step or anywhere in a save, a run goes on from its last published step and
ends as the one that nobody killed, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.faulty import SAVES, same
from tests.test_train import ROOT, SMALL, train

# Runs train.py, and kills itself in the second save: when this function is called, before it does anything.
KILLS_ITSELF = """
import os, runpy, signal, sys
site, root = sys.argv[1:3]
sys.argv[1:3] = []
sys.path.insert(0, root)
import parallel.checkpoint, parallel.pieces
owner, name = {"pieces": (parallel.pieces, "save_file"), "hash": (parallel.checkpoint, "_hash_share"),
               "manifest": (parallel.checkpoint, "_publish"), "rename": (os, "rename")}[site]
works = getattr(owner, name)
def dies(*args, **kwargs):
    if any(p.name == "step-00000002" for p in __import__("pathlib").Path("run/checkpoints").glob("*")):
        os.kill(os.getpid(), signal.SIGKILL)
    return works(*args, **kwargs)
setattr(owner, name, dies)
runpy.run_path(root + "/train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train(corpus, run, *SAVES)
    return run


@pytest.mark.parametrize("site", ["pieces", "hash", "manifest", "rename"])
def test_killed_in_a_save(corpus, tmp_path, unbroken, site):
    options = [*SMALL, f"data.path={corpus}", "run.dir=run", *SAVES]
    start = [sys.executable, "-c", KILLS_ITSELF, site, str(ROOT), *options]
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step-00000002", "step-00000004.tmp"}
    again = train(corpus, tmp_path / "run", *SAVES)
    assert "continues" in again.stdout
    assert "step-00000002" in again.stdout
    same(tmp_path / "run", unbroken)


def children(pid: int) -> list[int]:
    """All processes below one."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [c for child in map(int, listed) for c in [child, *children(child)]]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_killed_in_a_step_ends_all_and_the_run_goes_on(corpus, tmp_path, unbroken_by_two, rank):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = tmp_path / "run"
    options = [*SMALL, f"data.path={corpus}", f"run.dir={run}", *SAVES]
    start = [str(ROOT / "launch/local.sh"), "-n", "2", *options]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    ranks = []
    for line in process.stdout:
        if line.startswith("step      3/"):
            below = children(process.pid)
            ranks = [p for p in below if f"RANK={rank}" in Path(f"/proc/{p}/environ").read_text().split("\0")]
            os.kill(ranks[0], signal.SIGKILL)
            break
    process.stdout.read()
    assert process.wait(60) == 0, "the supervisor has started it again"
    assert not [p for p in below if Path(f"/proc/{p}").exists()], "no process is left behind"
    same(run, unbroken_by_two)
