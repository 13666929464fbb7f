"""F33: a rank whose memory runs out says so in one line, and the run goes on from its last checkpoint."""

import json
import subprocess
import sys

import pytest

from tests.test_train import ROOT, SMALL, errors, lines, train

# Runs train.py on a host that has 256 MiB left when a step begins that needs more.
STARVES = """
import resource, runpy, sys
at, root = sys.argv[1:3]
sys.argv[1:3] = []
sys.path.insert(0, root)
import torch
from parallel.engine import Engine
works, count = Engine.train_step, [0]
def train_step(self, *args):
    count[0] += 1
    if count[0] != int(at):
        return works(self, *args)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
    return works(self, *args), torch.ones(2**30)
Engine.train_step = train_step
runpy.run_path(root + "/train.py", run_name="__main__")
"""


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_memory_that_runs_out(corpus, tmp_path, step):
    run = tmp_path / "run"
    options = ["train.steps=6", "checkpoint.every=2"]
    started = [sys.executable, "-c", STARVES, str(step), str(ROOT), *SMALL, f"data.path={corpus}", f"run.dir={run}"]
    done = subprocess.run([*started, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 70, done.stderr
    (line,) = errors(done)
    assert "Traceback" not in done.stderr
    for part in ("memory rank 0 on cpu", "GiB in use at most", "train.micro_batch", "data.seq_len"):
        assert part in line
    assert json.loads((run / "exit.json").read_text()).items() >= {"code": 70, "reason": line}.items()
    assert max(lines(run), default=0) == step - 1
    assert "continues" in train(corpus, run, *options).stdout or step == 1
    assert max(lines(run)) == 6
