"""What is handed to sbatch, and what is refused before. `tests/test_slurm.py` does it on a real cluster."""

import os
import subprocess
from pathlib import Path

import pytest

from launch import submit
from launch.compose import compose, from_text
from tests.test_compose import NEEDED


@pytest.fixture
def queued(monkeypatch, tmp_path) -> Path:
    """A file with the arguments of each sbatch, a line each and an empty one behind; it numbers jobs 101, 102, ..."""
    calls, script = tmp_path / "calls", tmp_path / "bin/sbatch"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" '' >>{calls}\necho $((100 + $(grep -c '^$' {calls})))\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return calls


NAMES = ["a b", "it's", 'say "so"', "$(touch harm)", "`touch harm`", "; touch harm", "100%", "two\nlines"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_a_shell_would_read_otherwise(queued, name, monkeypatch):
    """F36: sbatch gets each byte; the script that it gets for the comparison is one that executes no name."""
    script = queued.parent / "bin/sbatch"
    script.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" '' >>{queued}\necho 101\n")
    quoted = "'" + name.replace("'", r"\'") + "'"
    arguments = [*NEEDED, f"run.dir={quoted}"]
    assert submit.main(["--gpus-per-node=1", *arguments]) == 0
    assert submit.main(["--gpus-per-node=1", "-m", *arguments, "seed=0,1"]) == 0
    run, array, comparison = (job.split("\0") for job in queued.read_text().split("\0\0")[:-1])
    assert run[-len(arguments) :] == arguments
    folder = queued.parent / name
    assert array[-1] == f"{folder}/array"
    assert f"--output={str(folder).replace('%', '%%')}/array/%a.out" in array
    overrides = (folder / "array/1").read_text().split("\0")
    assert from_text(_composed(overrides[:-1], monkeypatch)).run.dir == f"{name}/seed-1"
    wrap = next(a for a in comparison if a.startswith("--wrap=")).removeprefix("--wrap=")
    subprocess.run(["bash", "-n"], input=wrap, text=True, check=True)
    done = subprocess.run(["sh", "-c", wrap], capture_output=True, text=True, check=False)
    assert done.returncode == 66, done.stderr
    assert " ".join(f"left out: {folder}/seed-0: it has not ended".split()) in " ".join(done.stderr.split())
    assert not list(queued.parent.glob("**/harm"))


def _composed(overrides: list[str], monkeypatch) -> str:
    monkeypatch.setattr("sys.argv", ["train.py", *overrides])
    return compose(1)


def jobs(queued: Path) -> list[list[str]]:
    return [job.splitlines() for job in queued.read_text().split("\n\n")[:-1]]


def test_a_run_is_queued_with_its_options_as_they_are(queued, capsys):
    assert submit.main(["--nodes=2", "--gpus-per-node=h100:2", *NEEDED, "model.name='a b'"]) == 0
    assert jobs(queued) == [
        ["--parsable", "--nodes=2", "--gpus-per-node=h100:2", str(submit.SCRIPT), *NEEDED, "model.name='a b'"]
    ]
    assert capsys.readouterr().out == "job 101\n"


MISTAKES = [
    (["--nodes=1", "--gpus-per-node=2", "parallel.tp=3"], "does not divide the 2 processes"),
    (["--nodes=2", "--ntasks-per-node=4", "parallel.tp=3"], "does not divide the 8 processes"),
    (["--nodes=two"], "--nodes=two"),
    (["--nodes=1", "--gpus-per-node=1", "-m", "seed=0,0"], "two runs would both be"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=str)
def test_a_mistake_is_said_before_anything_is_queued(queued, capsys, arguments, says):
    assert submit.main([*arguments, *NEEDED]) == 64
    assert says in capsys.readouterr().err
    assert not queued.exists()
    assert sorted(p.name for p in queued.parent.iterdir()) == ["bin"]


def test_what_sbatch_refuses_is_one_line(queued, capsys, monkeypatch):
    (queued.parent / "bin/sbatch").write_text("#!/bin/sh\necho sbatch: error: no such partition >&2\nexit 1\n")
    assert submit.main(["--gpus-per-node=1", *NEEDED]) == 64
    assert "sbatch: error: no such partition" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit.main(["--gpus-per-node=1", *NEEDED]) == 64
    assert "submit on a machine of the cluster" in capsys.readouterr().err


def test_a_multirun_is_a_job_array_and_a_comparison_behind_it(queued, capsys, monkeypatch):
    arguments = ["--partition=a b", "--gpus-per-node=1", "--time=60", "-m", *NEEDED, "seed=0,1", 'run.dir="it\'s"']
    assert submit.main(arguments) == 0
    array, comparison = jobs(queued)
    folder = queued.parent / "it's"
    own, typed = ["--array=0-1", f"--output={folder}/array/%a.out"], arguments[:3]
    assert array == ["--parsable", *own, *typed, str(submit.SCRIPT), f"{folder}/array"]
    overrides = (folder / "array/1").read_text().split("\0")
    assert overrides == [*NEEDED, "seed=1", 'run.dir="it\'s/seed-1"', ""]
    assert "--partition=a b" in comparison
    assert "--dependency=afterany:101" in comparison
    assert not {"--gpus-per-node=1", "--time=60"} & set(comparison)
    wrap = next(a for a in comparison if a.startswith("--wrap=")).removeprefix("--wrap=")
    monkeypatch.chdir("/")
    done = subprocess.run(["sh", "-c", wrap], capture_output=True, text=True, check=False)
    assert done.returncode == 66, done.stderr
    assert f"left out: {folder}/seed-0: it has not ended" in done.stderr
