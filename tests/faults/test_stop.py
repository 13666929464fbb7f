"""F02, F07 to F10, F31, F32: asked to stop, killed from above, out of time, a wrong clock, company, two nodes.

No step is lost that could be kept, and what goes on ends as the run that nothing happened to.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from launch.nodes import free_port
from tests.faults.faulty import SAVES, faulty, newest, ranks, same
from tests.test_train import lines

slow = pytest.mark.slow


def logged(run: Path) -> list[int]:
    """Steps in the order in which they were made."""
    return [m["step"] for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in m]


def until(process: subprocess.Popen, step: int) -> None:
    """Read until this step is logged."""
    for line in process.stdout:
        if line.startswith(f"step {step:>6}/"):
            return
    raise AssertionError(f"no step {step}")


def goes_on(corpus: str, place: Path, unbroken: Path) -> None:
    """Start it again: it ends as the unbroken one."""
    said, _ = faulty(corpus, place, "", *SAVES).communicate()
    same(place / "run", unbroken)
    assert "continues" in said


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("warn:1:3", 3),  # SIGUSR1 to one rank
        pytest.param("ask:0:3", 3, marks=slow),
        pytest.param("ask twice:1:3", 3, marks=slow),
        pytest.param("ask:1:1", 1, marks=slow),  # before there is a checkpoint
    ],
)
def test_asked_in_a_step_it_ends_after_it_and_loses_nothing(corpus, tmp_path, unbroken_by_two, fault, step):
    process = faulty(corpus, tmp_path, fault, *SAVES)
    process.communicate()
    assert process.returncode == 75
    # The fault comes before the ranks agree on whether somebody was asked, in the same step.
    assert newest(tmp_path / "run") == step
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 75
    goes_on(corpus, tmp_path, unbroken_by_two)
    assert logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


@slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 0)])
def test_the_supervisor_asked(corpus, tmp_path, unbroken_by_two, number, code):
    process = faulty(corpus, tmp_path, "slow:1:3,slow:1:4", *SAVES)
    until(process, 2)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code
    assert newest(tmp_path / "run") in (3, 4)
    goes_on(corpus, tmp_path, unbroken_by_two)
    assert logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


@slow
def test_asked_during_an_evaluation(corpus, tmp_path, unbroken_by_two):
    process = faulty(corpus, tmp_path, "", *SAVES, "train.eval_every=2", "train.eval_batches=60")
    until(process, 2)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    goes_on(corpus, tmp_path, unbroken_by_two)
    assert logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


def test_the_supervisor_killed_takes_all_with_it(corpus, tmp_path, unbroken_by_two):
    process = faulty(corpus, tmp_path, "loop:1:4", *SAVES)
    until(process, 3)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 3, "torchrun and two ranks"
    process.kill()
    _, alive = psutil.wait_procs(below, timeout=15)
    assert not alive
    goes_on(corpus, tmp_path, unbroken_by_two)


@slow
def test_torchrun_killed_takes_the_ranks_with_it_and_is_started_again(corpus, tmp_path, unbroken_by_two):
    process = faulty(corpus, tmp_path, "loop:1:4", *SAVES)
    until(process, 3)
    (torchrun,) = psutil.Process(process.pid).children()
    below = torchrun.children(recursive=True)
    torchrun.kill()
    _, alive = psutil.wait_procs(below, timeout=15)
    assert not alive
    process.communicate()
    assert process.returncode == 0
    same(tmp_path / "run", unbroken_by_two)


def test_it_ends_before_its_time_is_over(corpus, tmp_path):
    limit = 120 if torch.cuda.is_available() else 25  # on a GPU to start and compile takes longer
    started = time.monotonic()
    process = faulty(corpus, tmp_path, "", "train.steps=100000", f"run.time_limit={limit}", "checkpoint.every=50")
    said, _ = process.communicate()
    assert process.returncode == 75, said
    assert time.monotonic() - started < limit
    assert "the end of run.time_limit" in json.loads((tmp_path / "run/exit.json").read_text())["reason"]
    assert newest(tmp_path / "run") == logged(tmp_path / "run")[-1], "saved at its last step"


@slow
@pytest.mark.timeout(1200)
def test_a_queue_that_gives_it_slices_of_time(corpus, tmp_path):
    """Some limits are too short even for the start: then it makes one step, and saves it."""
    steps = ["train.steps=200", "checkpoint.every=40"]
    faulty(corpus, tmp_path / "whole", "", *steps).communicate()
    draw, codes = random.Random(10), []
    while 0 not in codes:
        limit = f"run.time_limit={draw.uniform(5, 22):.1f}" if len(codes) < 5 else "run.time_limit=10:00"
        process = faulty(corpus, tmp_path / "slices", "", *steps, limit)
        process.communicate()
        codes.append(process.returncode)
        assert process.returncode in (0, 75)
    assert codes.count(75) >= 2
    run = tmp_path / "slices" / "run"
    same(run, tmp_path / "whole" / "run")
    assert logged(run) == list(range(1, 201)), "no step was lost"
    goodputs = [m["goodput"] for m in lines(run).values()]
    assert 0 < goodputs[-1] < json.loads((tmp_path / "whole/run/exit.json").read_text())["goodput"]


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_clock_that_jumps_back_changes_nothing(corpus, tmp_path, unbroken_by_two, rank):
    process = faulty(corpus, tmp_path, f"clock:{rank}:3", *SAVES, "run.time_limit=10:00")
    process.communicate()
    assert process.returncode == 0
    same(tmp_path / "run", unbroken_by_two)
    assert all(0 < m["goodput"] <= 1 for m in lines(tmp_path / "run").values())


@slow
def test_two_runs_on_one_machine_do_not_meet(corpus, tmp_path, unbroken_by_two):
    processes = [faulty(corpus, tmp_path / name, "", *SAVES) for name in ("a", "b")]
    for process, name in zip(processes, ("a", "b")):
        process.communicate()
        assert process.returncode == 0
        same(tmp_path / name / "run", unbroken_by_two)


@slow
@pytest.mark.parametrize("fault", ["", "kill", "stop:1:4"])
def test_two_nodes(corpus, tmp_path, unbroken_by_two, fault):
    """Two supervisors of one rank each: what happens to one node starts both again."""
    head = f"127.0.0.1:{free_port()}"
    options = [*SAVES, "parallel.timeout=5"]
    inside = fault if ":" in fault else "slow:1:4"
    nodes = [
        faulty(corpus, tmp_path, inside, *options, "--nodes", "2", "--node", str(k), "--head", head, processes=1)
        for k in range(2)
    ]
    if fault == "kill":
        until(nodes[0], 3)
        os.kill(ranks(nodes[1])[0], signal.SIGKILL)
    said = [p.communicate(timeout=300)[0] for p in nodes]
    assert [p.returncode for p in nodes] == [0, 0], said
    assert [text.count("supervisor: failure") for text in said] == [int(bool(fault)), 0], "one node says it"
    same(tmp_path / "run", unbroken_by_two)
