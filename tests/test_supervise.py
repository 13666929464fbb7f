"""The supervisor for real, around a small program that fails as it is told."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.nodes import free_port
from launch.supervise import agreed

ROOT = Path(__file__).resolve().parent.parent
# Start by start it does the next words of $PLAN: publishes a checkpoint, leaves with a code, dies, waits for a signal.
PROGRAM = """
import os, pathlib, signal, sys, time
place = pathlib.Path(os.environ["PLACE"])
rank = os.environ.get("RANK", "0")
starts = place / ("starts" + rank)
with open(starts, "a") as f:
    f.write(" ".join([os.environ.get("MASTER_PORT", "-"), os.environ.get("WORLD_SIZE", "1")]) + "\\n")
attempt = len(starts.read_text().splitlines())
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda n, _: asked.append(n))
code = None
for word in os.environ["PLAN"].split(",")[attempt - 1].split():
    if word == "save":
        (place / "run" / "checkpoints" / f"step-{attempt:08d}").mkdir(parents=True)
    elif word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "die1":
        os.kill(os.getpid(), signal.SIGKILL) if rank == "1" else None
        time.sleep(1)
        sys.exit(1)
    elif word == "wait":
        (place / ("waits" + rank)).touch()
        while not asked:
            time.sleep(0.02)
        code = 0 if signal.SIGINT in asked else 75
    else:
        code = int(word)
if rank == "0":
    pathlib.Path(os.environ["SPARSETRON_EXIT_FILE"]).write_text(str(code))
sys.exit(code)
"""


@pytest.fixture
def start(tmp_path):
    """Start a supervisor around PROGRAM; those still there at the end of the test are killed."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []

    def begin(plan: str, *arguments: str, **env: str) -> subprocess.Popen:
        env = {**os.environ, "PLAN": plan, "PLACE": str(tmp_path), **env}
        env |= {"SPARSETRON_TRAIN": str(tmp_path / "program.py"), "PYTHONPATH": str(ROOT)}
        options = ["data.path=tokens", f"run.dir={tmp_path / 'run'}"]
        command = [sys.executable, "-m", "launch.supervise", *(arguments or ("-n", "1")), *options]
        started.append(subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def starts(place: Path, rank: int = 0) -> list[str]:
    return (place / f"starts{rank}").read_text().splitlines()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert path.exists()


def test_a_failure_is_followed_by_another_start(start, tmp_path):
    process = start("die,71,0")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(starts(tmp_path)) == 3
    assert "failure 1 of 3 without a newer checkpoint, exit code 70" in said
    assert "failure 2 of 3 without a newer checkpoint, exit code 71" in said


def test_three_failures_without_progress_are_the_end(start, tmp_path):
    process = start("save die,die,save die,71,71,0")  # 70 of which the third makes progress
    _, said = process.communicate(timeout=60)
    assert process.returncode == 71, "the run's own code"
    assert len(starts(tmp_path)) == 5
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "3 failures without a newer checkpoint, the last with exit code 71" in line
    assert "starts again from step-00000003" in said


@pytest.mark.parametrize("code", [64, 65, 66, 75, 76])
def test_what_another_start_would_not_mend_ends_it(start, tmp_path, code):
    assert start(f"{code},0").wait(60) == code
    assert len(starts(tmp_path)) == 1


def test_a_bad_configuration_starts_nothing(start, tmp_path):
    process = start("0", "-n", "3", "parallel.tp=2")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 64
    assert said.startswith("error: config parallel.tp*pp=2")
    assert not (tmp_path / "starts0").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 0)])
def test_a_signal_is_passed_on_and_ends_it(start, tmp_path, number, code):
    process = start("wait,0")
    wait_for(tmp_path / "waits0")
    process.send_signal(number)
    assert process.wait(60) == code
    assert len(starts(tmp_path)) == 1


def test_a_signal_between_two_starts_ends_it(start, tmp_path):
    process = start("die,0")
    assert "starts again" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert len(starts(tmp_path)) == 1


def test_ranks_under_torchrun_are_asked_past_it_and_met_at_another_place_each_time(start, tmp_path):
    process = start("die1,wait", "-n", "2")
    wait_for(tmp_path / "waits0")
    wait_for(tmp_path / "waits1")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    ports = [line.split() for line in starts(tmp_path)]
    assert [world for _, world in ports] == ["2", "2"]
    assert ports[0] != ports[1]


def test_a_signal_to_torchrun_itself_is_no_traceback(start, tmp_path):
    process = start("wait", "-n", "2")
    for rank in range(2):
        wait_for(tmp_path / f"waits{rank}")
    (torchrun,) = psutil.Process(process.pid).children()
    torchrun.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "Traceback" not in said


@pytest.mark.parametrize("processes", [1, 2])
def test_with_the_supervisor_killed_nothing_is_left(start, tmp_path, processes):
    process = start("wait", "-n", str(processes))
    for rank in range(processes):
        wait_for(tmp_path / f"waits{rank}")
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= processes
    # What torchrun started is a stand-in here, which does not ask the kernel to die with it, as train.py does.
    launcher = [p for p in below if p.ppid() == process.pid]
    process.kill()
    gone, alive = psutil.wait_procs(launcher, timeout=10)
    assert not alive
    for p in below:
        if p not in gone and p.is_running():
            p.kill()


def test_two_nodes_fail_start_again_and_end_together(start, tmp_path):
    head = f"127.0.0.1:{free_port()}"
    nodes = [start("die1,75", "--nodes", "2", "--node", str(k), "--head", head, "-n", "1") for k in range(2)]
    said = [p.communicate(timeout=120)[1] for p in nodes]
    assert [p.returncode for p in nodes] == [75, 75], said
    lines = [starts(tmp_path, rank) for rank in range(2)]
    assert lines[0] == lines[1], "both met at the same place"
    assert len(set(lines[0])) == 2, "another one after the failure"


@pytest.mark.slow
def test_with_the_head_gone_the_others_end_too(start, tmp_path):
    head = f"127.0.0.1:{free_port()}"
    nodes = [start("wait", "--nodes", "2", "--node", str(k), "--head", head, "-n", "1") for k in range(2)]
    wait_for(tmp_path / "waits1")
    below = psutil.Process(nodes[1].pid).children(recursive=True)
    nodes[0].kill()
    _, said = nodes[1].communicate(timeout=60)
    assert nodes[1].returncode == 70
    assert "error: supervisor of node 0: is gone" in said
    assert not [p for p in below if p.is_running()]


def test_a_head_that_is_taken_or_unknown_is_said(start):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        taken = f"127.0.0.1:{s.getsockname()[1]}"
        for head in (taken, "no-such-host.invalid:2000", "nonsense"):
            process = start("0", "--nodes", "2", "--node", "0", "--head", head, "-n", "1")
            _, said = process.communicate(timeout=60)
            assert process.returncode == 64
            (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
            assert head in line


def test_what_a_rank_said_goes_before_what_was_asked_and_that_before_a_failure():
    silent = {"code": None, "asked": None}
    assert agreed([silent, {**silent, "code": 71}]) == 71
    assert agreed([{**silent, "asked": 75}, {**silent, "code": 0}]) == 0
    assert agreed([silent, {**silent, "asked": 75}]) == 75
    assert agreed([silent, silent]) == 70
