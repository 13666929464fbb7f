"""Train, and again after a failure: python -m launch.supervise [-n PROCESSES] OVERRIDES...

One process a GPU unless -n says otherwise, one where there is none. On several machines there is a supervisor on each:
--nodes N --node K (slurm's by default) --head HOST:PORT, a free port of node 0. Each start is a fresh torchrun with a
rendezvous of its own. Progress is a newer checkpoint: after three failures without one the run is given up. A run that
is done, was asked to stop, or met an error that somebody has to mend (configs/errors.py) is not started again. Signals
are passed on. Leaves with the run's own exit code, which torchrun would turn into 1.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from configs.errors import FINAL, PREEMPTED, RunError
from configs.options import Options
from launch import processes
from launch.clock import STARTED, process_start
from launch.compose import compose, from_text, is_multirun
from launch.nodes import Nodes
from launch.stop import Stop

ROOT = Path(__file__).resolve().parent.parent
FAILURES = 3
PAUSE = 1.0  # seconds before another start, times the failures without progress
GRACE = 30.0  # seconds for this machine's processes to end by themselves when those of another one have


@dataclass(frozen=True)
class Job:
    """What is started on this machine."""

    train: list[str]  # the program and its overrides
    run: Path
    processes: int

    def ranks(self, nodes: Nodes) -> int:
        """Processes that torchrun starts here; 0 without it, where a process is alone and has nobody to join."""
        return 0 if nodes.nodes == self.processes == 1 else self.processes

    def command(self, nodes: Nodes, port: int, attempt: int) -> list[str]:
        """Of one start."""
        if not self.ranks(nodes):
            return [sys.executable, *self.train]
        where = ["--standalone"]
        if nodes.nodes > 1:
            where = ["--nnodes", nodes.nodes, "--node-rank", nodes.node, "--rdzv-id", attempt]
            where += ["--master-addr", nodes.host, "--master-port", port]
        return [*processes.torchrun(), *map(str, where), "--nproc-per-node", str(self.processes), *self.train]

    @property
    def newest(self) -> str:
        """Name of the newest published checkpoint."""
        return max((p.name for p in (self.run / "checkpoints").glob("step-*[0-9]")), default="")


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    stop = Stop()
    try:
        options, overrides = _parse(arguments)
        train = [os.environ.get("SPARSETRON_TRAIN", str(ROOT / "train.py")), *overrides]
        sys.argv = train
        if is_multirun() and options.nodes == 1:  # starts a supervisor for each run
            os.environ["SPARSETRON_PROCESSES"] = str(options.n)
            os.execv(sys.executable, [sys.executable, *train])
        text = _compose(options)
        if not text:  # Hydra showed something
            return 0
        job = Job(train, Path(from_text(text).run.dir), options.n)
        return supervise(job, Nodes(options.nodes, options.node, options.head), stop)
    except RunError as e:
        print(e, file=sys.stderr, flush=True)
        return e.code
    except KeyboardInterrupt:  # asked twice
        return 128 + signal.SIGINT


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Options("python -m launch.supervise", add_help=False, allow_abbrev=False)  # --help is that of train.py
    parser.add_argument("-n", type=int)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=int(os.environ.get("SLURM_NODEID", "0")))
    parser.add_argument("--head", default="")
    options, overrides = parser.parse_known_args(arguments)
    if options.n is None:
        import torch  # takes seconds

        options.n = max(1, torch.cuda.device_count())
    return options, overrides


def _compose(options: argparse.Namespace) -> Optional[str]:
    """The configuration; None if Hydra showed something. A mistake is for node 0 to say, the others only leave."""
    try:
        return compose(options.n * options.nodes)
    except RunError as e:
        if options.node:
            raise SystemExit(e.code) from e
        raise


def supervise(job: Job, nodes: Nodes, stop: Stop) -> int:
    """Start the run until it ends for good. Returns its exit code."""
    newest, fruitless = job.newest, 0
    for attempt in itertools.count():
        port = nodes.meet(attempt, lambda: bool(stop.signals))
        code = _start(job, nodes, port, attempt, stop)
        outcomes = nodes.report(attempt, {"code": code, "asked": _asked(stop), "newest": job.newest})
        code = agreed(outcomes)
        fruitless = 1 if outcomes[0]["newest"] > newest else fruitless + 1
        newest = outcomes[0]["newest"]  # by one node: file systems may show it late
        if code in FINAL or fruitless == FAILURES:
            nodes.leave(attempt)
            if code not in FINAL and nodes.node == 0:
                print(_given_up(job, code), file=sys.stderr, flush=True)
            return code
        after = f"from {newest}" if newest else "from the beginning"
        failed = f"failure {fruitless} of {FAILURES} without a newer checkpoint, exit code {code}"
        if nodes.node == 0:
            print(f"supervisor: {failed}; starts again {after}", file=sys.stderr, flush=True)
        _pause(PAUSE * fruitless, stop)
    raise AssertionError


def agreed(outcomes: list[dict[str, Any]]) -> int:
    """One exit code for all machines: what rank 0 said, or else what somebody asked for, or else a failure."""
    said = [o["code"] for o in outcomes if o["code"] is not None]
    asked = [o["asked"] for o in outcomes if o["asked"] is not None]
    return next(iter([*said, *asked]), RunError.code)


def _start(job: Job, nodes: Nodes, port: int, attempt: int, stop: Stop) -> int | None:
    """One start, to its end. Returns the code that the run left behind; None if it was cut off before it could."""
    if stop.signals:
        return None
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "code")
        cores = max(1, (os.cpu_count() or 1) // job.processes)
        env = {"OMP_NUM_THREADS": str(cores), **os.environ, STARTED: str(process_start())}
        launcher = processes.start(job.command(nodes, port, attempt), {**env, "SPARSETRON_EXIT_FILE": str(said)})
        try:
            code = _wait(launcher, job, nodes, attempt, stop)
        finally:
            processes.end(launcher)
        return int(said.read_text()) if said.exists() else 0 if code == 0 else None


def _wait(launcher: subprocess.Popen, job: Job, nodes: Nodes, attempt: int, stop: Stop) -> int:
    """Until it ends, by itself or because those of another machine did. Passes signals on."""
    passed: set[int] = set()
    patience = GRACE
    while patience > 0:
        for number in stop.signals - passed:
            processes.ask(launcher, number, job.ranks(nodes))
            passed.add(number)
        try:
            return launcher.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            patience -= 0.2 if nodes.over(attempt) else 0
    return RunError.code


def _asked(stop: Stop) -> int | None:
    """The exit code of a run that ended before it could answer a request to stop."""
    if stop.signals & {signal.SIGTERM, signal.SIGUSR1}:
        return PREEMPTED
    return 0 if stop.signals else None


def _given_up(job: Job, code: int) -> RunError:
    why = f"{FAILURES} failures without a newer checkpoint, the last with exit code {code}"
    report = job.run / "exit.json"
    if report.exists():
        why += f" ({json.loads(report.read_text())['reason'].rstrip('.')})"
    return RunError("run", job.run, why, "find the cause in the messages above, then start it again")


def _pause(seconds: float, stop: Stop) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop.signals:
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
