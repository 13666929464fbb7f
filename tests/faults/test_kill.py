"""F01, F03, F05: killed without warning, in a step or anywhere in a save, which goes on behind training, a run goes on
from its last published step and ends as the one that nobody killed, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.faulty import SAVES, same
from tests.test_train import ROOT, SMALL, lines, train

# Runs train.py, and sends itself signals in the second save: when this function is called, before it does anything.
HURTS_ITSELF = """
import os, runpy, signal, sys, time
site, signals, root = sys.argv[1:4]
sys.argv[1:4] = []
sys.path.insert(0, root)
import parallel.pieces, parallel.saver
owner, name = {"pieces": (parallel.pieces, "save_file"), "hash": (parallel.saver, "sha256"),
               "manifest": (parallel.saver, "_publish"), "rename": (os, "rename")}[site]
works = getattr(owner, name)
def hurts(*args, **kwargs):
    there = [p for p in ("run/checkpoints/step-00000002", "run/checkpoints/step-00000004") if os.path.exists(p)]
    if there == ["run/checkpoints/step-00000002"]:
        for number in signals.split():
            os.kill(os.getpid(), int(number))
            time.sleep(1)
    return works(*args, **kwargs)
setattr(owner, name, hurts)
runpy.run_path(root + "/train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train(corpus, run, *SAVES)
    return run


def hurt(corpus: str, folder: Path, site: str, *signals: int) -> tuple[int, set[str]]:
    """A run that these signals reach in its save of step 4; returns its code and what it leaves of checkpoints."""
    options = [*SMALL, f"data.path={corpus}", "run.dir=run", *SAVES]
    start = [sys.executable, "-c", HURTS_ITSELF, site, " ".join(str(int(s)) for s in signals), str(ROOT), *options]
    done = subprocess.run(start, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, {p.name for p in (folder / "run" / "checkpoints").iterdir()}


def same_files(run: Path, other: Path) -> None:
    hashes = [json.loads((r / "checkpoints/step-00000006/MANIFEST.json").read_text())["files"] for r in (run, other)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("site", ["pieces", pytest.param("hash", marks=pytest.mark.slow), "manifest", "rename"])
def test_killed_in_a_save(corpus, tmp_path, unbroken, site):
    code, left = hurt(corpus, tmp_path, site, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert left == {"step-00000002", "step-00000004.tmp"}
    again = train(corpus, tmp_path / "run", *SAVES)
    assert "continues" in again.stdout
    assert "step-00000002" in again.stdout
    same(tmp_path / "run", unbroken)


def test_asked_to_stop_in_a_save_it_ends_that_and_saves_the_step_it_has_come_to(corpus, tmp_path, unbroken):
    code, left = hurt(corpus, tmp_path, "pieces", signal.SIGTERM)
    assert code == 75
    stopped = max(lines(tmp_path / "run"))
    assert left == {"step-00000004", f"step-{stopped:08d}"}
    train(corpus, tmp_path / "run", *SAVES)
    same(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_asked_twice_by_the_user_it_waits_for_nothing(corpus, tmp_path, unbroken):
    code, left = hurt(corpus, tmp_path, "pieces", signal.SIGINT, signal.SIGINT)
    assert code != 0
    assert left == {"step-00000002", "step-00000004.tmp"}
    train(corpus, tmp_path / "run", *SAVES)
    same(tmp_path / "run", unbroken)


def test_what_is_only_looked_at_changes_nothing(corpus, tmp_path, unbroken):
    """F29: how often is logged, evaluated, measured and saved, reading ahead, the dashboard, waiting for saves."""
    run = tmp_path / "run"
    train(
        corpus,
        run,
        *"train.steps=6 train.log_every=2 train.eval_every=3 train.eval_batches=1 train.health_every=2".split(),
        *"checkpoint.every=3 checkpoint.asynchronous=false data.read_ahead=4 data.verify=true".split(),
        *"wandb.mode=offline profile.steps=[2,3] deterministic=true".split(),
    )
    assert list(lines(run)) == [2, 4, 6]
    for step, m in lines(run).items():
        assert [m[k] for k in ("loss", "grad_norm")] == [lines(unbroken)[step][k] for k in ("loss", "grad_norm")]
    same_files(run, unbroken)


def children(pid: int) -> list[int]:
    """All processes below one."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [c for child in map(int, listed) for c in [child, *children(child)]]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
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
