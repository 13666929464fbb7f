"""python train.py -m KEY=A,B ...: the runs of a multirun in turn on this machine, and their comparison at the end.

Hydra expands the command line, and every run is checked before the first one starts. Each is a process of its own in a
directory named after what differs, so that the same command goes on where it was stopped and skips what is done.
"""

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from configs.errors import ConfigError, DivergedError, RunError
from launch import compare
from launch.compose import compose_all, from_text
from launch.stop import REASONS, Stop

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    directory: Path
    overrides: list[str]  # that make train.py run it there


def main(stop: Stop) -> int:
    """Run the sweep of the command line. Returns the exit code: of the run that ended it, or 76 if one diverged."""
    processes = int(os.environ.get("SPARSETRON_PROCESSES", "1"))
    try:
        jobs = plan(compose_all(processes))
        return run_all(jobs, processes, stop) if jobs else 0  # without any, Hydra showed something
    except RunError as e:
        print(e, file=sys.stderr, flush=True)
        return e.code


def plan(composed: list[tuple[list[str], str]]) -> list[Job]:
    """The jobs, from the overrides of each run and its resolved text.

    They lie in run.dir if that is given, else in runs/ under a name that the overrides decide. Raises ConfigError if
    two are the same.
    """
    every = [overrides for overrides, _ in composed]
    cfgs = [from_text(text) for _, text in composed]
    suffixes = ["-full" if cfg.twin else "" for cfg in cfgs]
    given = {c.run.dir.removesuffix(s) for c, s, o in zip(cfgs, suffixes, every) if _value("run.dir", o)}
    if len(given) > 1:
        raise ConfigError("config", "run.dir", "differs between the runs", "give one folder for all of them")
    digest = hashlib.sha256(repr(every).encode()).hexdigest()[:6]
    folder = Path(*given) if given else Path("runs", f"{cfgs[0].experiment or 'sweep'}-{digest}") if cfgs else Path()
    jobs = []
    for name, suffix, overrides in zip(names(every), suffixes, every):
        place = str(folder / name).replace('"', r"\"")
        jobs.append(Job(folder / (name + suffix), [*_without("run.dir", overrides), f'run.dir="{place}"']))
    for job in jobs:
        if sum(other.directory == job.directory for other in jobs) > 1:
            why = f"two runs would both be {job.directory}"
            raise ConfigError("config", "--multirun", why, "give each value once")
    return jobs


def names(every: list[list[str]]) -> list[str]:
    """A name for each run by the overrides that not all have: attention.n-8_seed-0. A twin has its run's name."""
    every = [_without("twin", _without("run.dir", overrides)) for overrides in every]
    return ["_".join(_plain(o) for o in own if not all(o in other for other in every)) or "run" for own in every]


def _plain(override: str) -> str:
    return re.sub(r"[^\w.-]+", "-", override).strip("-")


def _value(key: str, overrides: list[str]) -> Optional[str]:
    return next((o.split("=", 1)[1] for o in overrides if o.startswith(f"{key}=")), None)


def _without(key: str, overrides: list[str]) -> list[str]:
    return [o for o in overrides if not o.startswith(f"{key}=")]


def run_all(jobs: list[Job], processes: int, stop: Stop) -> int:
    """Run each job to its end, then compare. A run that diverged is a result; any other failure ends the sweep."""
    done, code = [], 0
    for i, job in enumerate(jobs, 1):
        print(f"== run {i} of {len(jobs)}: {job.directory}", flush=True)
        ended = _run(job, processes, stop)
        asked = stop.asked(job.directory.parent)
        if asked:
            return REASONS[asked][0]
        if ended not in (0, DivergedError.code):
            print(f"the sweep ends here: {job.directory} left with exit code {ended}", file=sys.stderr, flush=True)
            return ended
        code = max(code, ended)
        done += [str(job.directory)] if ended == 0 else []
    if done:
        compare.compare(done, jobs[0].directory.parent / "compare.html")
    return code


def _run(job: Job, processes: int, stop: Stop) -> int:
    """The exit code of one run, which is asked to stop when the sweep is."""
    start = [sys.executable, str(ROOT / "train.py")]
    if processes > 1:
        start = [str(ROOT / "launch/local.sh"), "-n", str(processes)]
    # In a session of its own: Ctrl-C reaches the sweep, which passes it on, and not the run a second time.
    child = subprocess.Popen([*start, *job.overrides], start_new_session=True)
    passed: set[int] = set()
    while True:
        for number in stop.signals - passed:
            child.send_signal(number)
            passed.add(number)
        try:
            return child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
