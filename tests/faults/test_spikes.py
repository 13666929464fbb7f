"""F24: losses that jump. One is left out; several in a row take the run back to before them, past their batches."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_train import ROOT, SMALL, errors, lines, train

# Runs train.py with the loss of some batches multiplied, and kills itself before a batch (-1: never).
SPIKES = """
import os, runpy, signal, sys
faulty, factor, dies, root = sys.argv[1:5]
sys.argv[1:5] = []
sys.path.insert(0, root)
import data.loader, parallel.loss
now, read = [0], data.loader.Loader.next_step
def next_step(self):
    made = read(self)
    now[0] = self.batch if self.split == "train" else 0
    if now[0] == int(dies):
        os.kill(os.getpid(), signal.SIGKILL)
    return made
data.loader.Loader.next_step = next_step
works = parallel.loss.CrossEntropy.__call__
parallel.loss.CrossEntropy.__call__ = lambda *args: works(*args) * (
    float(factor) if str(now[0]) in faulty.split() else 1.0)
runpy.run_path(root + "/train.py", run_name="__main__")
"""
GUARD = "guard.on_spike=rollback guard.window=3 guard.spike=50 guard.in_a_row=2 guard.rollbacks=1"
OPTIONS = [*"train.steps=9 checkpoint.every=1 checkpoint.keep=4".split(), *GUARD.split()]


Done = subprocess.CompletedProcess


def spiking(corpus, run, faulty: str, *more: str, factor=50.0, dies=-1, code=0, processes=1) -> Done:
    """Train with spikes in the `faulty` batches."""
    script = run.parent / "spikes.py"
    script.write_text(SPIKES)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = [*SMALL, f"data.path={corpus}", f"run.dir={run}", *OPTIONS, *more]
    started = [sys.executable, *(launcher if processes > 1 else []), str(script), faulty, str(factor), str(dies)]
    done = subprocess.run([*started, str(ROOT), *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def forewarned(corpus, tmp_path_factory) -> Path:
    """The run that was told from the start to pass over batches 6 and 7, in which nothing is wrong."""
    run = tmp_path_factory.mktemp("forewarned") / "run"
    train(corpus, run, *OPTIONS, "data.skip=[[6,7]]")
    return run


def same(run: Path, other: Path) -> None:
    for step, m in lines(other).items():
        for key in ("loss", "grad_norm", "lr", "tokens", "batch"):
            assert lines(run)[step][key] == m[key], (step, key)
    hashes = [json.loads((r / "checkpoints/step-00000009/MANIFEST.json").read_text())["files"] for r in (run, other)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("factor", [50.0, pytest.param("nan", marks=pytest.mark.slow)])
def test_spikes_in_a_row_take_the_run_back_past_their_batches(corpus, tmp_path, forewarned, factor):
    run = tmp_path / "run"
    done = spiking(corpus, run, "6 7", factor=factor)
    assert "back to step 5, past batches 6 to 7" in done.stdout
    same(run, forewarned)
    why = "loss spike" if factor == 50.0 else "not a number"
    entry = {"step": 7, "to": 5, "batches": [6, 7], "why": why}
    assert json.loads((run / "rollbacks.json").read_text()) == [entry]
    (logged,) = lines(run, "rolled_back").values()
    assert logged == {"tokens": 5 * 512, "rolled_back": 1, **entry}
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == ["abandoned-1-step-00000006", *(f"step-0000000{i}" for i in range(6, 10))]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel.pp=2"], ["parallel.zero=3"], ["parallel.tp=2"]], ids=str)
def test_on_two_processes(corpus, tmp_path, layout):
    told, run = tmp_path / "told", tmp_path / "run"
    train(corpus, told, *OPTIONS, "data.skip=[[6,7]]", *layout, processes=2)
    spiking(corpus, run, "6 7", *layout, processes=2)
    same(run, told)


def test_killed_after_going_back_it_passes_over_them_again(corpus, tmp_path, forewarned):
    run = tmp_path / "run"
    spiking(corpus, run, "6 7", "checkpoint.every=5", dies=9, code=-signal.SIGKILL)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000005"], "nothing was saved since"
    train(corpus, run, *OPTIONS)
    same(run, forewarned)


def test_the_budget_ends_it(corpus, tmp_path):
    run = tmp_path / "run"
    (line,) = errors(spiking(corpus, run, "5 6 7 8 9 10", code=76))
    assert "2 updates left out in a row" in line
    assert len(json.loads((run / "rollbacks.json").read_text())) == 1
    assert json.loads((run / "diverged" / "step-00000006.json").read_text())["batch"] == 8


@pytest.mark.slow
def test_one_spike_is_only_left_out_and_without_a_checkpoint_there_is_no_way_back(corpus, tmp_path):
    spiking(corpus, tmp_path / "one", "6")
    assert not (tmp_path / "one" / "rollbacks.json").exists()
    assert lines(tmp_path / "one", "update_skipped")[6]["updates_skipped"] == 1
    (line,) = errors(spiking(corpus, tmp_path / "none", "6 7", "checkpoint.every=9", code=76))
    assert "2 updates left out in a row" in line
