"""The launch scripts, run for real around a small program; stand-ins act like slurm's own commands."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
PROGRAM = """
import os, signal, sys, time
rank = os.environ["RANK"]
stopped = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: stopped.append(1))
out = os.path.join(os.environ["OUT"], "rank" + rank)
open(out, "w").write("\\n".join([os.environ["WORLD_SIZE"], *sys.argv[1:]]))
end = time.time() + float(os.environ.get("SECONDS_TO_RUN", "0"))
while time.time() < end and not stopped:
    time.sleep(0.05)
code = 75 if stopped else int(os.environ.get("CODE", "0"))
if rank == "0":
    open(os.environ["SPARSETRON_EXIT_FILE"], "w").write(str(code))
sys.exit(code)
"""


@pytest.fixture
def place(tmp_path) -> dict[str, str]:
    """An environment in which the scripts start PROGRAM, whose ranks write what they were given into OUT."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "out").mkdir()
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OUT": str(tmp_path / "out"), "SPARSETRON_TRAIN": str(tmp_path / "program.py")}


def given(place: dict[str, str]) -> dict[str, list[str]]:
    return {p.name: p.read_text().split("\n") for p in sorted(Path(place["OUT"]).iterdir())}


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "env.sh", "demo.sh"])
def test_bash_can_read(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def local(place, *args: str) -> subprocess.Popen:
    return subprocess.Popen([str(LAUNCH / "local.sh"), *args], env=place, stderr=subprocess.DEVNULL)


def test_local_passes_options_on_as_they_are(place):
    options = ["run.dir=runs/a b", "model.name='x'", 'data.path="q"', "attention.n=8"]
    assert local(place, "-n", "2", *options).wait(120) == 0
    assert given(place) == {"rank0": ["2", *options], "rank1": ["2", *options]}


@pytest.mark.parametrize("code", [0, 64, 75])
def test_local_leaves_with_the_runs_own_code(place, code):
    assert local({**place, "CODE": str(code)}, "-n", "2", "data.path=q").wait(120) == code


def test_local_starts_a_sweep_once_and_tells_it_how_many_processes_a_run_has(place, tmp_path):
    program = "import os, sys, pathlib; pathlib.Path(os.environ['OUT'], 'sweep').write_text("
    program += "'\\n'.join([os.environ['SPARSETRON_PROCESSES'], *sys.argv[1:]]))"
    (tmp_path / "program.py").write_text(program)
    assert local(place, "-n", "3", "-m", "seed=0,1").wait(120) == 0
    assert given(place) == {"sweep": ["3", "-m", "seed=0,1"]}


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert path.exists()
    time.sleep(0.3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_local_hands_a_request_to_stop_on_and_waits_for_the_run(place, number):
    process = local({**place, "SECONDS_TO_RUN": "60"}, "-n", "2", "data.path=q")
    wait_for(Path(place["OUT"], "rank1"))
    process.send_signal(number)
    assert process.wait(60) == 75


@pytest.mark.parametrize("lacking", ["python3", "torch, deepspeed, hydra, psutil"])
@pytest.mark.parametrize("script", ["local.sh", "demo.sh", "slurm.sbatch"])
def test_without_its_environment_a_script_says_so_in_a_line(script, lacking, tmp_path):
    for name in ("bash", "dirname", "rm"):
        (tmp_path / name).symlink_to(shutil.which(name))
    if lacking != "python3":
        (tmp_path / "python3").write_text(f'#!{tmp_path}/bash\nexec {sys.executable} -I -S "$@"\n')  # no packages
        (tmp_path / "python3").chmod(0o755)
    env = {"PATH": str(tmp_path), "SPARSETRON_HOME": str(LAUNCH.parent), "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", str(LAUNCH / script), "data.path=q"], env=env, capture_output=True, text=True)
    assert done.returncode == 64
    fix = "activate the one of Sparsetron (source .venv/bin/activate)"
    assert done.stderr == f"error: environment of the system: has no {lacking}; {fix}\n"


STAND_INS = {
    "scontrol": """case "$*" in
        "show hostnames"*) echo n0; echo n1 ;;
        *"show node n0") echo "Arch=x86_64 NodeAddr=127.0.0.1 Port=17003" ;;
        *) echo "$@" >>"$CALLS" ;;
    esac
""",
    "squeue": 'echo "${STATE:-RUNNING}"\n',
    "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',  # one task, the first: the command itself
}


@pytest.fixture
def slurm(place, tmp_path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        script = tmp_path / "bin" / name
        script.write_text(f"#!/usr/bin/env bash\n{body}")
        script.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path), "SPARSETRON_HOME": str(LAUNCH.parent), "SPARSETRON_PROCESSES": "2",
        "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "CALLS": str(tmp_path / "calls"),
    }  # fmt: skip
    return {**place, **job}


TASKS = {"SLURM_NTASKS_PER_NODE": "2"}


def sbatch(slurm, *args: str) -> subprocess.Popen:
    return subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), *args], env=slurm, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("mode", [{}, TASKS], ids=["torchrun", "tasks"])
def test_slurm_passes_options_on_as_they_are(slurm, mode):
    assert sbatch({**slurm, **mode}, "model.name=a b", "attention.n=8").wait(120) == 0
    expected = ["2", "model.name=a b", "attention.n=8"]
    assert given(slurm) == {f"rank{rank}": expected for rank in range(1 if mode else 2)}
    assert not Path(slurm["CALLS"]).exists(), "a run that is done is not queued again"


NASTY = [
    "a b",
    "it's",
    'say "so"',
    "$(touch harm)",
    "`touch harm`",
    "; touch harm",
    "$HOME",
    "*",
    "two\nlines",
    "\\",
    "%j",
    "-n",
]


@pytest.mark.parametrize("mode", [{}, TASKS], ids=["torchrun", "tasks"])
def test_slurm_hands_on_names_that_a_shell_would_read_otherwise(slurm, tmp_path, mode):
    """F36: each byte arrives, nothing is executed."""
    options = [f"run.dir={name}" for name in NASTY]
    assert (
        subprocess.run(["bash", LAUNCH / "slurm.sbatch", *options], env={**slurm, **mode}, cwd=tmp_path).returncode == 0
    )
    assert (Path(slurm["OUT"]) / "rank0").read_text() == "\n".join(["2", *options])
    assert not list(tmp_path.glob("**/harm"))


def test_slurm_takes_them_from_the_file_of_an_array_too(slurm, tmp_path):
    array = tmp_path / "it's $(touch harm)"
    array.mkdir()
    options = [f"run.dir={name}" for name in NASTY]
    (array / "3").write_text("".join(f"{o}\0" for o in options))
    job = {**slurm, **TASKS, "SLURM_ARRAY_TASK_ID": "3"}
    assert subprocess.run(["bash", LAUNCH / "slurm.sbatch", str(array)], env=job, cwd=tmp_path).returncode == 0
    assert (Path(slurm["OUT"]) / "rank0").read_text() == "\n".join(["2", *options])
    assert not list(tmp_path.glob("**/harm"))


def test_an_array_without_its_file_is_a_line(slurm):
    job = {**slurm, "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "x"], env=job, capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert done.stderr == "error: file x/3: no run for this job of the array; submit it with python -m launch.submit\n"


def test_slurm_does_not_queue_a_failed_run_again(slurm):
    assert sbatch({**slurm, **TASKS, "CODE": "65"}, "a=b").wait(120) == 65
    assert not Path(slurm["CALLS"]).exists()


def test_slurm_has_the_run_supervised_and_leaves_with_its_code(slurm, tmp_path):
    del slurm["SPARSETRON_TRAIN"]
    run = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "data.path=nowhere", "run.dir='a run'", "parallel.tp=2"],
        env=slurm, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 65, run.stderr
    assert run.stderr.count("error: ") == 1
    assert not Path(slurm["CALLS"]).exists()


def test_slurm_warns_the_run_and_queues_it_again(slurm):
    process = sbatch({**slurm, **TASKS, "SECONDS_TO_RUN": "60"}, "a=b")
    wait_for(Path(slurm["OUT"], "rank0"))
    process.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@300 sends to the batch script
    assert process.wait(60) == 75
    assert Path(slurm["CALLS"]).read_text() == "requeue 4711\n"


def test_slurm_does_not_queue_a_cancelled_run_again(slurm):
    assert sbatch({**slurm, **TASKS, "CODE": "75", "STATE": "COMPLETING"}, "a=b").wait(120) == 75
    assert not Path(slurm["CALLS"]).exists()


def test_slurm_has_to_find_the_project(slurm):
    del slurm["SPARSETRON_HOME"]
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch")], env=slurm, capture_output=True, text=True, check=False
    )
    assert done.returncode == 64
    assert done.stderr.startswith("error: folder ")
    assert done.stderr.count("\n") == 1
    assert given(slurm) == {}
