"""F38: 500 steps while everything happens to them, a fault each 20 steps or so; they end as those that nothing befell.

`make chaos` runs it and prints what happened. It takes about ten minutes on two cores.
"""

import collections
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.faults.faulty import faulty, newest, ranks, same

SEED = 20261124
STEPS = 500
NOT_A_NUMBER = "nan:0:123,nan:1:377"  # of the data, as it were: also in the run that nothing happens to
OPTIONS = [f"train.steps={STEPS}", "checkpoint.every=10", "checkpoint.keep=3", "parallel.timeout=6"]


class Chaos:
    """Chooses what happens next, and does it to a run."""

    def __init__(self, run: Path):
        self.run, self.draw = run, random.Random(SEED)
        self.happened: collections.Counter[str] = collections.Counter()
        self.reached, self.damaged = 0, -100
        self.starts, self.hit = 0, False
        self._choose()

    def started(self) -> None:
        """The run has started, or started again."""
        self.starts, self.hit = self.starts + 1, False

    def __call__(self, step: int, process) -> None:
        """After a step was logged; one thing at a time."""
        if self.hit or step < self.next:
            return
        self.reached, self.hit = step, True
        name = self.draw.choice(sorted(self.faults()))
        self.happened[name] += 1
        self.faults()[name](process)
        self._choose()

    def faults(self) -> dict[str, Callable]:
        """By name, those that are possible now."""
        faults = {
            "SIGKILL of a rank": lambda p: self._to_a_rank(p, signal.SIGKILL),
            "SIGKILL of torchrun": lambda p: psutil.Process(p.pid).children()[0].kill(),
            "SIGKILL of the supervisor": lambda p: p.kill(),
            "SIGTERM to the supervisor": lambda p: p.send_signal(signal.SIGTERM),
            "SIGUSR1 to a rank": lambda p: self._to_a_rank(p, signal.SIGUSR1),
            "hang (SIGSTOP of a rank)": lambda p: self._to_a_rank(p, signal.SIGSTOP),
        }
        if newest(self.run) >= self.damaged + 20:  # else no whole one would be left
            faults["newest checkpoint damaged, then SIGKILL"] = self._damage
        return faults

    def _choose(self) -> None:
        # Not closer: three failures without a checkpoint between them end a run, as they should.
        self.next = self.reached + 5 + int(self.draw.expovariate(1 / 15))

    def _to_a_rank(self, process, number: int) -> None:
        os.kill(ranks(process)[self.draw.randrange(2)], number)

    def _damage(self, process) -> None:
        self.damaged = newest(self.run)
        pieces = sorted((self.run / f"checkpoints/step-{self.damaged:08d}/pieces").iterdir())
        with open(self.draw.choice(pieces), "r+b") as f:
            f.seek(-5, os.SEEK_END)
            byte = f.read(1)[0]
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte ^ 4]))
        self._to_a_rank(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_chaos(corpus, tmp_path, capsys):
    calm = faulty(corpus, tmp_path / "calm", NOT_A_NUMBER, *OPTIONS)
    calm.communicate()
    assert calm.returncode == 0
    run = tmp_path / "chaos" / "run"
    chaos, started = Chaos(run), time.monotonic()
    code = None
    while code != 0:  # what ends with 75, or its supervisor, is started again, as a queue would
        assert code in (None, 75, -signal.SIGKILL), code
        process = faulty(corpus, run.parent, NOT_A_NUMBER, *OPTIONS)
        for line in process.stdout:
            if line.startswith(("starts ", "continues ")):
                chaos.started()
            step = re.match(r"step +(\d+)/", line)
            if step and int(step[1]) < STEPS:
                chaos(int(step[1]), process)
        code = process.wait()
    seconds = time.monotonic() - started
    same(run, tmp_path / "calm" / "run")
    left = [p for p in psutil.process_iter(["cmdline"]) if str(run) in " ".join(p.info["cmdline"] or [])]
    assert not left
    assert sum(chaos.happened.values()) > 10
    logged = [m["step"] for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in m]
    with capsys.disabled():
        goodput = [json.loads((r / "exit.json").read_text())["goodput"] for r in (run, tmp_path / "calm" / "run")]
        print(f"\n{STEPS} steps, seed {SEED}: {dict(chaos.happened)}")
        print(
            f"{sum(chaos.happened.values())} faults, {chaos.starts} starts, {len(logged) - STEPS + 2} steps made again"
        )
        print(f"{seconds:.0f} s; goodput {goodput[0]:.1%}, without faults {goodput[1]:.1%}; bit-identical")
